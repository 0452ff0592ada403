"""Files made from transformers' own networks, drawn at random, under the names of each publisher."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
)

from histoflare.masks.checkpoints import LoadedWeights, load_pretrained
from histoflare.masks.networks import build_network
from histoflare.masks.networks.dhunet import DHUnet
from tests.refusals import raises_reason

State = dict[str, Tensor]
WIDTH = 24
# Tensors of DHUnet's encoders. Swin: 4 of the embedding, 13 of each of 8 blocks, 3 of each of 3 merges.
# ConvNeXt: 4 of the stem, 9 of each of 12 blocks, 4 of each of 3 downsamplings.
SWIN_TENSORS, CONVNEXT_TENSORS = 4 + 13 * 8 + 3 * 3, 4 + 9 * 12 + 4 * 3


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def swin() -> SwinForImageClassification:
    config = SwinConfig(embed_dim=WIDTH, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
    model = SwinForImageClassification(config).eval()
    randomise(model, 1)
    return model


@pytest.fixture(scope="module")
def convnext() -> ConvNextForImageClassification:
    config = ConvNextConfig(hidden_sizes=[24, 48, 96, 192], depths=[3, 3, 9, 3])
    model = ConvNextForImageClassification(config).eval()
    randomise(model, 2)
    return model


def dhunet(width: int = WIDTH) -> DHUnet:
    network = build_network("dhunet", 3, width=width, seed=3)
    assert isinstance(network, DHUnet)
    return network.eval()


def layer(prefix: str, module: nn.Module) -> State:
    return {f"{prefix}.{key}": value.detach() for key, value in module.state_dict().items()}


def named_by_swin_authors(model: SwinForImageClassification) -> State:
    """As ``swin_tiny_patch4_window7_224.pth``: one qkv, merges at a stage's end, buffers of the geometry."""
    body = model.swin
    state = layer("patch_embed.proj", body.embeddings.patch_embeddings.projection)
    state |= layer("patch_embed.norm", body.embeddings.norm)
    for i, stage in enumerate(body.encoder.layers):
        for j, block in enumerate(stage.blocks):
            at, attention = f"layers.{i}.blocks.{j}", block.attention
            state |= layer(f"{at}.norm1", block.layernorm_before)
            state |= layer(f"{at}.norm2", block.layernorm_after)
            state |= layer(f"{at}.mlp.fc1", block.mlp.fc1) | layer(f"{at}.mlp.fc2", block.mlp.fc2)
            state |= layer(f"{at}.attn.proj", attention.o_proj)
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[f"{at}.attn.qkv.weight"] = torch.cat([each.weight.detach() for each in qkv])
            state[f"{at}.attn.qkv.bias"] = torch.cat([each.bias.detach() for each in qkv])
            bias = attention.relative_position_bias
            state[f"{at}.attn.relative_position_bias_table"] = bias.relative_position_bias_table.detach()
            state[f"{at}.attn.relative_position_index"] = bias.relative_position_index.view(49, 49)
            if j % 2 and i < 3:  # a shifted block of more than one window
                state[f"{at}.attn_mask"] = torch.zeros((8 // 2**i) ** 2, 49, 49)
        if stage.downsample is not None:
            state |= layer(f"layers.{i}.downsample.reduction", stage.downsample.reduction)
            state |= layer(f"layers.{i}.downsample.norm", stage.downsample.norm)
    return state | layer("norm", body.layernorm) | layer("head", model.classifier)


def named_by_timm(model: SwinForImageClassification) -> State:
    """As timm since 0.9: the merge into a stage at its beginning, no buffers, another head."""
    state: State = {}
    for key, value in named_by_swin_authors(model).items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        found = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        new = f"layers.{int(found[1]) + 1}.downsample.{found[2]}" if found else key
        state[new.replace("head.", "head.fc.")] = value
    return state


def named_by_convnext_authors(model: ConvNextForImageClassification) -> State:
    """As ``convnext_tiny_1k_224_ema.pth``."""
    body = model.convnext
    state = layer("downsample_layers.0.0", body.embeddings.patch_embeddings)
    state |= layer("downsample_layers.0.1", body.embeddings.layernorm)
    for i, stage in enumerate(body.encoder.stages):
        for k, part in enumerate(stage.downsampling_layer):
            state |= layer(f"downsample_layers.{i}.{k}", part)
        for j, block in enumerate(stage.layers):
            at = f"stages.{i}.{j}"
            state |= layer(f"{at}.dwconv", block.dwconv) | layer(f"{at}.norm", block.layernorm)
            state |= layer(f"{at}.pwconv1", block.pwconv1) | layer(f"{at}.pwconv2", block.pwconv2)
            state[f"{at}.gamma"] = block.layer_scale_parameter.detach()
    return state | layer("norm", body.layernorm) | layer("head", model.classifier)


def convnext_named_by_timm(model: ConvNextForImageClassification) -> State:
    body = model.convnext
    state = layer("stem.0", body.embeddings.patch_embeddings) | layer("stem.1", body.embeddings.layernorm)
    for i, stage in enumerate(body.encoder.stages):
        for k, part in enumerate(stage.downsampling_layer):
            state |= layer(f"stages.{i}.downsample.{k}", part)
        for j, block in enumerate(stage.layers):
            at = f"stages.{i}.blocks.{j}"
            state |= layer(f"{at}.conv_dw", block.dwconv) | layer(f"{at}.norm", block.layernorm)
            state |= layer(f"{at}.mlp.fc1", block.pwconv1) | layer(f"{at}.mlp.fc2", block.pwconv2)
            state[f"{at}.gamma"] = block.layer_scale_parameter.detach()
    return state | layer("head.norm", body.layernorm) | layer("head.fc", model.classifier)


def in_memory(model: nn.Module) -> State:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def saved(path: Path, state: State, under: str | None = None) -> Path:
    """Write a state: safetensors by suffix, else ``torch.save``, if wanted below a key with other things."""
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    else:
        torch.save(state if under is None else {under: state, "epoch": 300}, path)
    return path


def published(model: nn.Module, folder: Path) -> Path:
    """The file transformers itself writes, under the names of its hub."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder / "model.safetensors"


def images() -> Tensor:
    return torch.randn((1, 3, 224, 224), generator=torch.Generator().manual_seed(0))


def test_swin_takes_blocks_2_and_5_of_the_third_stage(
    swin: SwinForImageClassification, tmp_path: Path
) -> None:
    network = dhunet()
    assert load_pretrained(network, swin=published(swin, tmp_path)) == LoadedWeights(SWIN_TENSORS, 0)
    body = SwinModel(swin.config)
    body.load_state_dict(swin.swin.state_dict())
    third = body.encoder.layers[2]
    third.blocks = nn.ModuleList([third.blocks[2], third.blocks[5]])
    with torch.no_grad():
        expected = body.eval()(
            images(), output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).reshaped_hidden_states[1:]
        found = network.swin(images())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_convnext_takes_blocks_2_5_and_8_of_the_third_stage(
    convnext: ConvNextForImageClassification, tmp_path: Path
) -> None:
    network = dhunet()
    report = load_pretrained(network, convnext=published(convnext, tmp_path))
    assert report == LoadedWeights(0, CONVNEXT_TENSORS)
    body = ConvNextModel(convnext.config)
    body.load_state_dict(convnext.convnext.state_dict())
    third = body.encoder.stages[2]
    third.layers = nn.ModuleList([third.layers[index] for index in (2, 5, 8)])
    with torch.no_grad():
        expected = body.eval()(images(), output_hidden_states=True).hidden_states[-4:]
        found = network.convnext(images())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("names", "file", "under"),
    [
        (named_by_swin_authors, "swin.pth", "model"),
        (named_by_swin_authors, "swin.pth", None),
        (named_by_timm, "swin.safetensors", None),
        (in_memory, "swin.bin", None),
        (lambda model: in_memory(model.swin), "swin.bin", "state_dict"),
    ],
    ids=["authors", "old timm", "timm", "transformers 5", "without classifier"],
)
def test_every_publishers_names_give_the_same_swin(
    names: Callable[[nn.Module], State],
    file: str,
    under: str | None,
    swin: SwinForImageClassification,
    tmp_path: Path,
) -> None:
    expected, found = dhunet(), dhunet()
    load_pretrained(expected, swin=published(swin, tmp_path))
    load_pretrained(found, swin=saved(tmp_path / file, names(swin), under))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("names", "file", "under"),
    [
        (named_by_convnext_authors, "convnext.pth", "model"),
        (convnext_named_by_timm, "convnext.safetensors", None),
        (lambda model: in_memory(model.convnext), "convnext.pt", None),
    ],
    ids=["authors", "timm", "without classifier"],
)
def test_every_publishers_names_give_the_same_convnext(
    names: Callable[[nn.Module], State],
    file: str,
    under: str | None,
    convnext: ConvNextForImageClassification,
    tmp_path: Path,
) -> None:
    expected, found = dhunet(), dhunet()
    load_pretrained(expected, convnext=published(convnext, tmp_path))
    load_pretrained(found, convnext=saved(tmp_path / file, names(convnext), under))
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_half_precision_is_widened(swin: SwinForImageClassification, tmp_path: Path) -> None:
    halves = {key: value.half() for key, value in in_memory(swin).items()}
    network = dhunet()
    load_pretrained(network, swin=saved(tmp_path / "half.safetensors", halves))
    assert {tensor.dtype for tensor in network.swin.state_dict().values()} == {torch.float32}
    weight = swin.swin.embeddings.norm.weight.detach()
    assert torch.equal(network.swin.state_dict()["patch_embed.norm.weight"], weight.half().float())


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_more(key: str) -> Callable[[State], State]:
    return lambda state: {**state, key: torch.zeros(3)}


def with_nan(state: State) -> State:
    return {**state, "patch_embed.norm.bias": torch.full((WIDTH,), float("nan"))}


def transposed(state: State) -> State:
    key = "layers.1.blocks.0.mlp.fc1.weight"
    return {**state, key: state[key].T}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without("layers.0.blocks.1.norm2.bias"),
            ["1 missing", "stages.0.blocks.1.norm2.bias"],
        ),
        # A block that is not taken: the file is partial all the same.
        (
            without("layers.2.blocks.3.attn.proj.bias"),
            ["1 missing", "stages.2.blocks.3.attn.proj.bias"],
        ),
        (with_more("neck.weight"), ["1 unexpected", "neck.weight"]),
        (with_more("head.bias.extra"), ["1 unexpected", "head.bias.extra"]),
        (
            with_more("layers.2.blocks.6.norm1.bias"),
            ["1 unexpected", "stages.2.blocks.6.norm1.bias"],
        ),
        # The same tensor under two publishers' names.
        (with_more("embeddings.norm.bias"), ["1 unexpected", "embeddings.norm.bias"]),
        (
            transposed,
            ["1 of another shape", ".1.blocks.0.mlp.linear1.weight", "(48, 192)", "(192, 48)"],
        ),
        (with_nan, ["NaN", "patch_embed.norm.bias"]),
        (lambda state: {}, [f"{SWIN_TENSORS + 4 * 13} missing", ", …"]),
    ],
)
def test_a_wrong_file_is_an_error_that_lists_keys_and_changes_nothing(
    change: Callable[[State], State],
    said: list[str],
    swin: SwinForImageClassification,
    convnext: ConvNextForImageClassification,
    tmp_path: Path,
) -> None:
    network = dhunet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    good = saved(tmp_path / "convnext.pth", named_by_convnext_authors(convnext), "model")
    bad = saved(tmp_path / "swin.pth", change(named_by_swin_authors(swin)), "model")
    with raises_reason("CHECKPOINT_INVALID", "swin.pth", *said) as caught:
        load_pretrained(network, swin=bad, convnext=good)
    assert "swin.pth" in str(caught.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_another_networks_file_lists_ten_keys_and_how_many(
    swin: SwinForImageClassification, convnext: ConvNextForImageClassification, tmp_path: Path
) -> None:
    network = dhunet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = saved(tmp_path / "swin.pth", named_by_swin_authors(swin))
    other = saved(tmp_path / "other.pth", {f"layer{index}.weight": torch.zeros(2) for index in range(12)})
    with raises_reason("CHECKPOINT_INVALID", "12") as caught:
        load_pretrained(network, swin=first, convnext=other)
    listed = [index for index in range(12) if f"layer{index}.weight" in str(caught.value)]
    assert listed == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]  # the first ten in order of their names
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_files_that_were_exchanged_are_refused(
    swin: SwinForImageClassification, convnext: ConvNextForImageClassification, tmp_path: Path
) -> None:
    of_swin, of_convnext = published(swin, tmp_path / "s"), published(convnext, tmp_path / "c")
    with raises_reason("CHECKPOINT_INVALID", "Swin-T"):
        load_pretrained(dhunet(), swin=of_convnext)
    with raises_reason("CHECKPOINT_INVALID", "ConvNeXt-T"):
        load_pretrained(dhunet(), convnext=of_swin)


def test_another_width_is_refused(swin: SwinForImageClassification, tmp_path: Path) -> None:
    with raises_reason("CHECKPOINT_INVALID", "(24, 3, 4, 4)", "(48, 3"):
        load_pretrained(dhunet(48), swin=published(swin, tmp_path))


class Trap:
    """Would be run if a file were unpickled without care."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (Path.touch, (Path("trap"),))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("there-is-none.pth", None, "CHECKPOINT_MISSING"),
        ("cut.safetensors", b"\x10\x00", "CHECKPOINT_INVALID"),
        ("empty.pth", b"", "CHECKPOINT_INVALID"),
        ("noise.pth", b"no checkpoint", "CHECKPOINT_INVALID"),
        ("trap.pth", Trap(), "CHECKPOINT_INVALID"),
        ("list.pth", [1, 2], "CHECKPOINT_INVALID"),
    ],
)
def test_a_damaged_or_dangerous_file_is_refused(
    file: str, content: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / file)
    with raises_reason(reason, file):
        load_pretrained(dhunet(), swin=tmp_path / file)
    assert not (tmp_path / "trap").exists()


def test_other_networks_take_none(tmp_path: Path) -> None:
    unet = build_network("unet-monai-31m", 3, width=WIDTH, seed=0)
    with raises_reason("CHECKPOINT_INVALID", "dhunet", "UNet"):
        load_pretrained(unet, swin=tmp_path / "swin.pth")


def test_without_files_nothing_changes() -> None:
    network = dhunet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert load_pretrained(network) == LoadedWeights(0, 0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
