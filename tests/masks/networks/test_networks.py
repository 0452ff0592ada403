"""What every network keeps to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from histoflare.masks.networks import NETWORKS, build_network
from tests.refusals import raises_reason

CLASSES, SMALL = 3, 24
# Of width 96 and 4 classes: the figure of the paper's code, and those of the libraries' own networks.
PARAMETERS = {"dhunet": 55.4e6, "unet-monai-31m": 31.1e6, "convnext-upernet": 46.5e6}


def images(batch: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def size_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def small(name: str, norm: str = "batch", seed: int = 1) -> nn.Module:
    return build_network(name, CLASSES, width=SMALL, norm=norm, seed=seed)


@pytest.fixture(params=sorted(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["batch", "group"])
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_network_has_a_size_in_this_list() -> None:
    assert set(PARAMETERS) == set(NETWORKS)


def test_full_size_has_the_known_number_of_parameters(name: str) -> None:
    assert size_of(build_network(name, 4, seed=0)) == pytest.approx(PARAMETERS[name], abs=0.05e6)


def test_logits_have_the_images_size(name: str, norm: str) -> None:
    network = small(name, norm)
    training = network(images(2, 64, 96))
    assert isinstance(training, list) and len(training) == len(network.loss_weights)  # type: ignore[arg-type]
    assert {tuple(logits.shape) for logits in training} == {(2, CLASSES, 64, 96)}
    network.eval()
    with torch.no_grad():
        logits = network(images(1, 96, 64))
    assert isinstance(logits, Tensor) and logits.shape == (1, CLASSES, 96, 64)
    assert torch.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize("side_px", [32, 224])
def test_a_batch_of_one_image_can_be_trained_on(name: str, norm: str, side_px: int) -> None:
    # 32 px: the coarsest map is a single value per channel, without a variance.
    with torch.no_grad():
        outputs = small(name, norm)(images(1, side_px, side_px))
    assert all(torch.isfinite(logits).all() for logits in outputs)


def test_in_evaluation_an_image_does_not_depend_on_its_batch(name: str, norm: str) -> None:
    network = small(name, norm).eval()
    batch = images(3)
    with torch.no_grad():
        torch.testing.assert_close(network(batch)[1:2], network(batch[1:2]), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes_whatever_the_global_state(name: str) -> None:
    torch.manual_seed(3)
    first = small(name).state_dict()
    torch.rand(5)
    before = torch.get_rng_state()
    second = small(name).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.numpy().tobytes() == second[key].numpy().tobytes(), key
    other = small(name, seed=2).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_without_drop_path_training_does_not_draw(name: str) -> None:
    network = build_network(name, CLASSES, width=SMALL, drop_path=False, norm="group", seed=1)
    first, second = network(images(4)), network(images(4))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("with_drop_path", ["dhunet", "convnext-upernet"])
def test_with_drop_path_training_draws(with_drop_path: str) -> None:
    network = small(with_drop_path, "group")
    for key, parameter in network.named_parameters():
        if "layer_scale" in key:  # 1e-6 at first: what is dropped would not be seen
            parameter.data.fill_(1.0)
    torch.manual_seed(0)
    first, second = network(images(4)), network(images(4))
    assert not torch.equal(first[0], second[0])


def test_the_state_is_plain_and_goes_through_copies(name: str) -> None:
    network = small(name)
    assert {type(tensor) for tensor in network.state_dict().values()} == {Tensor}
    integers = {key for key, tensor in network.state_dict().items() if not tensor.is_floating_point()}
    assert all(key.endswith("num_batches_tracked") for key in integers)
    network.eval()
    with torch.no_grad():
        expected = network(images(1))
        assert torch.equal(copy.deepcopy(network)(images(1)), expected)
        fresh = small(name, seed=9).eval()
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(images(1)), expected)


def test_group_norm_keeps_no_statistics(name: str) -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small(name, "group").modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in small(name, "batch").modules())
    assert not any("running" in key for key in small(name, "group").state_dict())
    assert size_of(small(name, "group")) == size_of(small(name, "batch"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "dhu-net"}, ["'dhu-net'", "dhunet, unet-monai-31m, convnext-upernet"]),
        ({"norm": "layer"}, ["'layer'", "batch, group"]),
        ({"width": 100}, [" 24 ", "not 100"]),
        ({"width": 0}, [" 24 ", "not 0"]),
        ({"classes": 1}, [" 2 ", "not 1"]),
    ],
)
def test_what_there_is_not_is_an_error_that_says_what_there_is(
    arguments: dict[str, object], said: list[str]
) -> None:
    options = {"name": "dhunet", "classes": CLASSES, "width": SMALL, "seed": 0, **arguments}
    with raises_reason("JOB_INVALID", *said):
        build_network(**options)  # type: ignore[arg-type]
