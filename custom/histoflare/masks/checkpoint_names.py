"""The names that published files of Swin and ConvNeXt give their tensors, and those of our encoders.

The authors' files, timm's and transformers' hold the same tensors under other names. Two things are more than
a name: transformers has query, key and value apart (ours are one tensor, in this order), and new timm counts
a stage's patch merge with the stage after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

# Patterns match the whole of a key; \1 is the stage, \2 the block.
_SWIN_LAYER = r"layers\.(\d)\.blocks\.(\d+)\."
_SWIN_BLOCK = r"stages.\1.blocks.\2."

SWIN_RULES: Rules = (
    # the authors and timm
    (r"patch_embed\.(proj|norm)\.(weight|bias)", r"patch_embed.\1.\2"),
    (_SWIN_LAYER + r"(norm[12]|attn\.qkv|attn\.proj)\.(weight|bias)", _SWIN_BLOCK + r"\3.\4"),
    (_SWIN_LAYER + r"attn\.relative_position_bias_table", _SWIN_BLOCK + "attn.relative_position_bias_table"),
    (_SWIN_LAYER + r"mlp\.fc([12])\.(weight|bias)", _SWIN_BLOCK + r"mlp.linear\3.\4"),
    (r"layers\.(\d)\.downsample\.(reduction|norm)\.(weight|bias)", r"merges.\1.\2.\3"),
    # transformers, below "encoder." and "embeddings.": files on its hub
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(weight|bias)", r"patch_embed.norm.\1"),
    (_SWIN_LAYER + r"layernorm_before\.(weight|bias)", _SWIN_BLOCK + r"norm1.\3"),
    (_SWIN_LAYER + r"layernorm_after\.(weight|bias)", _SWIN_BLOCK + r"norm2.\3"),
    (_SWIN_LAYER + r"attention\.self\.(query|key|value)\.(weight|bias)", _SWIN_BLOCK + r"attn.\3.\4"),
    (
        _SWIN_LAYER + r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
        _SWIN_BLOCK + "attn.relative_position_bias_table",
    ),
    (_SWIN_LAYER + r"attention\.output\.dense\.(weight|bias)", _SWIN_BLOCK + r"attn.proj.\3"),
    (_SWIN_LAYER + r"intermediate\.dense\.(weight|bias)", _SWIN_BLOCK + r"mlp.linear1.\3"),
    (_SWIN_LAYER + r"output\.dense\.(weight|bias)", _SWIN_BLOCK + r"mlp.linear2.\3"),
    # transformers, the same in the memory of its version 5
    (_SWIN_LAYER + r"attention\.q_proj\.(weight|bias)", _SWIN_BLOCK + r"attn.query.\3"),
    (_SWIN_LAYER + r"attention\.k_proj\.(weight|bias)", _SWIN_BLOCK + r"attn.key.\3"),
    (_SWIN_LAYER + r"attention\.v_proj\.(weight|bias)", _SWIN_BLOCK + r"attn.value.\3"),
    (_SWIN_LAYER + r"attention\.o_proj\.(weight|bias)", _SWIN_BLOCK + r"attn.proj.\3"),
)

_CONVNEXT_BLOCK = r"stages.\1.layers.\2."
_CONVNEXT_TIMM = r"stages\.(\d)\.blocks\.(\d+)\."
_CONVNEXT_AUTHORS = r"stages\.(\d)\.(\d+)\."
_CONVNEXT_HUB = r"stages\.(\d)\.layers\.(\d+)\."

CONVNEXT_RULES: Rules = (
    # the authors
    (r"downsample_layers\.0\.0\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    (r"downsample_layers\.0\.1\.(weight|bias)", r"embeddings.layernorm.\1"),
    (r"downsample_layers\.([123])\.([01])\.(weight|bias)", r"stages.\1.downsampling_layer.\2.\3"),
    (_CONVNEXT_AUTHORS + r"(dwconv|pwconv[12])\.(weight|bias)", _CONVNEXT_BLOCK + r"\3.\4"),
    (_CONVNEXT_AUTHORS + r"norm\.(weight|bias)", _CONVNEXT_BLOCK + r"layernorm.\3"),
    (_CONVNEXT_AUTHORS + r"gamma", _CONVNEXT_BLOCK + "layer_scale_parameter"),
    # timm
    (r"stem\.0\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    (r"stem\.1\.(weight|bias)", r"embeddings.layernorm.\1"),
    (r"stages\.(\d)\.downsample\.([01])\.(weight|bias)", r"stages.\1.downsampling_layer.\2.\3"),
    (_CONVNEXT_TIMM + r"conv_dw\.(weight|bias)", _CONVNEXT_BLOCK + r"dwconv.\3"),
    (_CONVNEXT_TIMM + r"norm\.(weight|bias)", _CONVNEXT_BLOCK + r"layernorm.\3"),
    (_CONVNEXT_TIMM + r"mlp\.fc([12])\.(weight|bias)", _CONVNEXT_BLOCK + r"pwconv\3.\4"),
    (_CONVNEXT_TIMM + r"gamma", _CONVNEXT_BLOCK + "layer_scale_parameter"),
    # transformers
    (r"embeddings\.(patch_embeddings|layernorm)\.(weight|bias)", r"embeddings.\1.\2"),
    (r"stages\.(\d)\.downsampling_layer\.([01])\.(weight|bias)", r"stages.\1.downsampling_layer.\2.\3"),
    (_CONVNEXT_HUB + r"(dwconv|layernorm|pwconv[12])\.(weight|bias)", _CONVNEXT_BLOCK + r"\3.\4"),
    (_CONVNEXT_HUB + r"layer_scale_parameter", _CONVNEXT_BLOCK + "layer_scale_parameter"),
)

# The classifier and the norm before it, in all of them.
CLASSIFIER = frozenset(
    f"{layer}.{kind}"
    for layer in ("norm", "head", "head.fc", "head.norm", "layernorm", "classifier")
    for kind in ("weight", "bias")
)
# What follows from the size of window and map alone: the authors' files and old ones of others keep it.
SWIN_CONSTANTS = frozenset(
    f"layers.{stage}.blocks.{block}.{name}"
    for stage, depth in enumerate((2, 2, 6, 2))
    for block in range(depth)
    for name in ("attn_mask", "attn.relative_position_index", "attention.self.relative_position_index")
)


def swin_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a Swin file under the names of ``SwinEncoder``, and the other keys."""
    bare = _without_prefix(tensors, ("swin.", "encoder."))
    if any(key.startswith("layers.3.downsample.") for key in bare):
        # New timm: the merge into stage i is stage i's. Everywhere else it ends stage i - 1.
        bare = {
            re.sub(
                r"^layers\.([123])\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key
            ): value
            for key, value in bare.items()
        }
    found, unexpected = _rename(bare, SWIN_RULES, CLASSIFIER | SWIN_CONSTANTS)
    return _join_query_key_value(found), unexpected


def convnext_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a ConvNeXt file under the names of ``ConvNeXtEncoder``, and the other keys."""
    return _rename(_without_prefix(tensors, ("convnext.", "encoder.")), CONVNEXT_RULES, CLASSIFIER)


def _without_prefix(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors with these prefixes taken off, one after the other, where a key has them."""
    bare = {}
    for key, value in tensors.items():
        short = key
        for prefix in prefixes:
            short = short.removeprefix(prefix)
        bare[short] = value
    return bare


def _rename(
    tensors: Mapping[str, Tensor], rules: Rules, unused: frozenset[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that a rule names, under that name, and the keys without one that are not unused.

    A key whose new name another key had before counts as one without a name.
    """
    found: dict[str, Tensor] = {}
    unexpected = []
    for key, value in tensors.items():
        if key in unused:
            continue
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, key)
            if match is not None:
                name = match.expand(replacement)
                break
        else:
            name = ""
        if not name or name in found:
            unexpected.append(key)
        else:
            found[name] = value
    return found, unexpected


def _join_query_key_value(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with query, key and value of a block, where all are there, as its one ``qkv``."""
    joined = dict(found)
    for name in found:
        if ".attn.query." not in name:
            continue
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in joined for part in parts):
            qkv = torch.cat([joined.pop(part) for part in parts])  # (3 d, d) or (3 d,)
            joined[name.replace(".query.", ".qkv.")] = qkv
    return joined
