from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import PatchMergingV2
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig, SwinModel

from histoflare.masks.checkpoint_names import swin_names
from histoflare.masks.networks.swin import SwinEncoder, position_index

WIDTH = 24


CONFIG = {"embed_dim": WIDTH, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}


def reference(seed: int = 0) -> SwinModel:
    """transformers' own Swin with DHUnet's depths; every tensor drawn, position biases too."""
    torch.manual_seed(seed)
    model = SwinModel(SwinConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def encoder_of(model: SwinModel) -> SwinEncoder:
    encoder = SwinEncoder(WIDTH, 0.2).eval()
    tensors, _ = swin_names(model.state_dict())
    encoder.load_state_dict(tensors)
    return encoder


def images(height: int, width: int) -> Tensor:
    return torch.randn((1, 3, height, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(224, 224), (256, 320)])
def test_features_are_those_of_transformers_before_each_merge(size: tuple[int, int]) -> None:
    # 224 px: the last map is a single window, which is not shifted. 256 x 320 px: every map is padded.
    # (transformers' SwinBackbone shifts a single window too and differs in the last map; SwinModel does not.)
    model = reference()
    with torch.no_grad():
        expected = model(
            images(*size), output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).reshaped_hidden_states[1:]
        found = encoder_of(model)(images(*size))
    assert [each.shape[1] for each in found] == [24, 48, 96, 192]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_backbone_that_shifts_a_single_window_differs_in_the_last_map_alone() -> None:
    model = reference()
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinBackbone(SwinConfig(**CONFIG, out_features=stages))
    backbone.swin.load_state_dict(model.state_dict())
    for name in backbone.hidden_states_norms:
        backbone.hidden_states_norms[name] = nn.Identity()
    with torch.no_grad():
        theirs = backbone.eval()(images(224, 224)).feature_maps
        ours = encoder_of(model)(images(224, 224))
    close = [
        torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
        for one, two in zip(ours, theirs, strict=True)
    ]
    assert close == [True, True, True, False]


def test_a_merge_takes_the_quadrants_in_the_order_of_the_original() -> None:
    # Liu et al.: (even row, even column), (odd row, even column), (even row, odd column), (odd, odd).
    merge = SwinEncoder(WIDTH, 0.0).merges[0]
    assert isinstance(merge, PatchMergingV2)
    merge.norm = nn.Identity()
    x = torch.zeros(1, 2, 2, WIDTH)
    x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1] = 1.0, 2.0, 3.0, 4.0
    found = []
    for half in range(2):
        with torch.no_grad():
            merge.reduction.weight.copy_(torch.eye(4 * WIDTH)[half * 2 * WIDTH : (half + 1) * 2 * WIDTH])
            found.append(merge(x)[0, 0, 0])
    assert torch.equal(torch.cat(found), torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(WIDTH))


@pytest.mark.parametrize("window", [(7, 7), (4, 7), (2, 2), (1, 1)])
def test_a_smaller_window_has_the_biases_of_the_same_offsets(window: tuple[int, int]) -> None:
    index = position_index(window)
    places = [(y, x) for y in range(window[0]) for x in range(window[1])]
    for i, (y, x) in enumerate(places):
        for j, (other_y, other_x) in enumerate(places):
            assert index[i, j] == (y - other_y + 6) * 13 + (x - other_x + 6)


def test_a_small_image_is_seen_as_by_a_network_made_for_it() -> None:
    # 64 px: the maps are 16, 8, 4 and 2 wide. transformers makes such small windows if told so; their tables
    # are the middle of the large one's.
    model = reference()
    encoder = encoder_of(model)
    with torch.no_grad():
        x, size = model.embeddings(images(64, 64))
        for stage, layer in enumerate(model.encoder.layers):
            side = min(7, 16 // 2**stage)
            for block in layer.blocks:
                bias = block.attention.relative_position_bias
                if side < 7:
                    middle = slice(7 - side, 6 + side)
                    table = bias.relative_position_bias_table.view(13, 13, -1)[middle, middle]
                    small = type(bias)(table.shape[-1], (side, side))
                    small.relative_position_bias_table.copy_(table.reshape(-1, table.shape[-1]))
                    block.attention.relative_position_bias = small
            x, before, _ = layer(x, size, output_hidden_states_before_downsampling=True)
            size = (size[0] // 2, size[1] // 2)
            ours = encoder(images(64, 64))[stage]
            torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_images_of_another_size_in_between_change_nothing() -> None:
    encoder = SwinEncoder(WIDTH, 0.0).eval()
    with torch.no_grad():
        first = encoder(images(224, 224))
        encoder(images(64, 96))
        again = encoder(images(224, 224))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
