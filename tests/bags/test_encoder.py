from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import DenseNet121
from PIL import Image
from torch import nn

from histoflare.bags import densenet as densenet_module
from histoflare.bags import encoder as encoder_module
from histoflare.bags.encoder import load_encoder, load_encoder_of
from histoflare.bags.preprocessing import SUFFIX, Preprocessing
from histoflare.errors import EncoderError
from tests.refusals import raises_reason


def save(path: Path, content: object) -> str:
    """Write ``content`` as PyTorch does; return the file's SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def random_patches(count: int, side_px: int = 64, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, (count, 3, side_px, side_px), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def monai_network() -> DenseNet121:
    """A DenseNet121 whose every tensor is its own, so that one loaded into another's place shows."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.8, 1.2)
                module.bias.data.uniform_(-0.1, 0.1)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return network.eval()


def rename(state: Mapping[str, torch.Tensor], naming: str) -> dict[str, torch.Tensor]:
    """Return MONAI's tensors under the names of ``naming``."""
    if naming == "monai":
        return dict(state)
    dot = "." if naming == "torchvision-old" else ""
    renamed = {}
    for key, tensor in state.items():
        if dot and key.endswith("num_batches_tracked"):
            continue  # the published file is older than this counter
        key = re.sub(r"\.layers\.(norm|conv)([12])\.", rf".\g<1>{dot}\g<2>.", key)
        renamed[key.replace("class_layers.out.", "classifier.")] = tensor
    return renamed


@pytest.mark.parametrize("naming", ["monai", "torchvision-old", "torchvision-new"])
def test_weights_under_every_naming_give_monais_features(
    tmp_path: Path, monai_network: DenseNet121, naming: str
) -> None:
    digest = save(tmp_path / "w.pth", rename(monai_network.state_dict(), naming))
    encoder = load_encoder("densenet121", tmp_path / "w.pth", digest, "cpu")
    assert (encoder.id, encoder.features) == (f"densenet121:{digest[:12]}", 1024)
    patches = random_patches(2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        images = (patches / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        layers = monai_network.class_layers
        expected = layers.flatten(layers.pool(layers.relu(monai_network.features(images))))
    torch.testing.assert_close(encoder.encode(patches), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "extra", "empty", "list"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monai_network: DenseNet121, fault: str) -> None:
    state = rename(monai_network.state_dict(), "torchvision-old")
    key = "features.denseblock3.denselayer24.conv.2.weight"
    content: object = state
    if fault == "missing":
        del state[key]
    elif fault == "shape":
        state[key] = state[key][:, :64]
    elif fault == "nan":
        state[key] = state[key] * torch.nan
    elif fault == "extra":
        state["features.denseblock3.denselayer25.conv.2.weight"] = state[key]
    else:
        content = {} if fault == "empty" else [1, 2]
    digest = save(tmp_path / "w.pth", content)
    with raises_reason("ENCODER_WEIGHTS", "DenseNet121"):
        load_encoder("densenet121", tmp_path / "w.pth", digest, "cpu")


class Trap:
    """Unpickling it would make the file ``mark``."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_nothing_in_a_weight_file_runs(tmp_path: Path) -> None:
    digest = save(tmp_path / "w.pth", {"features.conv0.weight": Trap(tmp_path / "mark")})
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "mark").exists(), "the trap does not work"
    (tmp_path / "mark").unlink()
    with pytest.raises(EncoderError) as wrong_hash:
        load_encoder("densenet121", tmp_path / "w.pth", "0" * 64, "cpu")
    with pytest.raises(EncoderError) as unsafe:
        load_encoder("densenet121", tmp_path / "w.pth", digest, "cpu")
    assert (wrong_hash.value.reason, unsafe.value.reason) == ("ENCODER_HASH", "ENCODER_WEIGHTS")
    assert not (tmp_path / "mark").exists()


def test_the_hash_is_needed_and_shown(tmp_path: Path) -> None:
    digest = save(tmp_path / "w.pth", {})
    with raises_reason("ENCODER_HASH", digest):
        load_encoder("densenet121", tmp_path / "w.pth", None, "cpu")
    with pytest.raises(EncoderError) as error:
        load_encoder("densenet121", tmp_path / "none.pth", digest, "cpu")
    assert error.value.reason == "ENCODER_WEIGHTS_MISSING"


@pytest.mark.parametrize("spec", ["resnet50", "torchscript:", "torchscript:a/b", "densenet121-random:v1", ""])
def test_unknown_encoders_are_refused(spec: str) -> None:
    with raises_reason("ENCODER_UNKNOWN", "densenet121-random"):
        load_encoder(spec)


def test_a_weight_file_for_the_random_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError):
        load_encoder("densenet121-random", tmp_path / "w.pth")


@pytest.fixture(scope="module")
def random_encoder() -> encoder_module.Encoder:
    return load_encoder("densenet121-random", device="cpu")


def test_random_encoder_is_named_so_and_built_once(random_encoder: encoder_module.Encoder) -> None:
    assert "random" in random_encoder.id
    assert load_encoder("densenet121-random", device="cpu") is random_encoder


def test_features_depend_neither_on_the_batch_nor_on_its_size(random_encoder: encoder_module.Encoder) -> None:
    patches = random_patches(5)
    together = random_encoder.encode(patches)
    assert together.shape == (5, 1024) and together.dtype == torch.float32
    alone = torch.cat([random_encoder.encode(patch[None]) for patch in patches])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    others = torch.cat([patches[:1], torch.full_like(patches[1:], 255)])
    torch.testing.assert_close(random_encoder.encode(others)[0], together[0], rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_features_are_ordinary_tensors(random_encoder: encoder_module.Encoder) -> None:
    features = random_encoder.encode(random_patches(1, 32))
    nn.Linear(1024, 1)(features).sum().backward()  # a tensor of inference mode raises here
    assert random_encoder.encode(random_patches(0)).shape == (0, 1024)


def test_two_processes_make_the_same_random_encoder() -> None:
    code = (
        "import torch, hashlib; from histoflare.bags.densenet import densenet121; torch.manual_seed({});"
        "tensors = densenet121().state_dict().values();"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in tensors)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.format(seed)], capture_output=True, text=True, check=True
        ).stdout
        for seed in (0, 1)
    }
    assert len(digests) == 1


def test_building_leaves_pytorchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    densenet_module.densenet121()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "patches",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_input_than_rgb_bytes_is_refused(
    random_encoder: encoder_module.Encoder, patches: torch.Tensor
) -> None:
    with pytest.raises(EncoderError) as error:
        random_encoder.encode(patches)
    assert error.value.reason == "ENCODER_INPUT"


class Pooled(nn.Module):
    """Mean colour of normalised images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


class Centred(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean(dim=(2, 3))
        return pooled - pooled.mean(dim=0)


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


class Logarithm(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.log(-images.abs().mean(dim=(2, 3)))


class Only224(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.view(images.shape[0], 3 * 224 * 224)[:, :5]


class Tokens(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=2).transpose(1, 2)


class HalfInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.mean(dim=(2, 3)).half())


HALVES = "mean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\ninput_px = 32\n"


def script(path: Path, network: nn.Module, preprocessing: str = HALVES) -> str:
    """Write the network, and beside it what it was trained with; return the SHA-256 of its file."""
    torch.jit.script(network).save(str(path))
    if preprocessing:
        path.with_name(path.name + SUFFIX).write_text(preprocessing)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0, 0, 0), (1, 1, 1)),
    ],
)
def test_torchscript_gets_the_mean_and_std_that_are_given_with_it(
    tmp_path: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    text = f"mean = {list(mean)}\nstd = {list(std)}\ninput_px = 32"
    digest = script(tmp_path / "m.pt", Pooled(), text)
    encoder = load_encoder("torchscript:uni2", tmp_path / "m.pt", digest, "cpu")
    grey = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    expected = [(0.2 - centre) / deviation for centre, deviation in zip(mean, std, strict=True)]
    torch.testing.assert_close(encoder.encode(grey), torch.tensor([expected]), rtol=1e-4, atol=1e-4)
    assert encoder.preprocessing is not None
    assert encoder.preprocessing.to_json() == {
        "mean": list(mean),
        "std": list(std),
        "input_px": 32,
        "interpolation": None,
    }


def test_an_encoder_s_id_tells_weights_and_preprocessing(tmp_path: Path) -> None:
    ids = set()
    for text in (HALVES, HALVES.replace("32", "64"), HALVES.replace("0.5]", "0.4]")):
        for interpolation in ("", 'interpolation = "bicubic"', 'interpolation = "bilinear"'):
            digest = script(tmp_path / "m.pt", Pooled(), text + interpolation)
            encoder = load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu")
            assert encoder.id.startswith(f"torchscript:x:{digest[:12]}-")
            assert load_encoder_of(encoder.id, tmp_path / "m.pt", device="cpu").id == encoder.id
            ids.add(encoder.id)
    assert len(ids) == 9
    (tmp_path / "m.pt.toml").write_text(f"# whole numbers, another order\n{HALVES}".replace("0.5]", "0.50]"))
    again = load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu")
    assert again.id in ids


def test_an_encoder_by_its_id_is_that_encoder_or_none(tmp_path: Path) -> None:
    digest = script(tmp_path / "m.pt", Pooled())
    weights = tmp_path / "m.pt"
    wanted = load_encoder("torchscript:x", weights, digest, "cpu").id
    faults = {
        f"torchscript:x:{'0' * 12}-{wanted[-8:]}": "ENCODER_HASH",
        f"torchscript:x:{digest[:12]}-00000000": "ENCODER_MISMATCH",
        f"torchscript:x:{digest[:12]}": "ENCODER_MISMATCH",  # as ids were before they told the normalisation
        "torchscript:x:-00000000": "ENCODER_HASH",
        "imported:uni2": "ENCODER_UNKNOWN",
    }
    for encoder_id, reason in faults.items():
        with pytest.raises(EncoderError) as error:
            load_encoder_of(encoder_id, weights, device="cpu")
        assert error.value.reason == reason, encoder_id
    with raises_reason("ENCODER_MISMATCH", "ImageNet"):
        load_encoder_of(f"torchscript:x:{digest[:12]}", weights, device="cpu")
    with pytest.raises(EncoderError) as error:
        load_encoder_of(wanted)
    assert error.value.reason == "ENCODER_WEIGHTS_MISSING"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "mean, std and input size"),
        ("mean = [0.5, 0.5, 0.5]", " std, input_px;"),
        (f"{HALVES}crop = 1", " crop"),
        (HALVES.replace("0.5]", "123.7]"), " 255"),
        (HALVES.replace("std = [0.5, ", "std = [0, "), "std: "),
        (HALVES.replace("0.5, 0.5, 0.5", "0.5, 0.5"), "mean: "),
        (HALVES.replace("32", "0"), "input_px: "),
        (f"{HALVES}interpolation = 'nearest'", "interpolation: "),
        ("mean = [", ".toml: "),
    ],
)
def test_what_is_not_given_or_cannot_be_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    digest = script(tmp_path / "m.pt", Pooled(), text)
    with raises_reason("ENCODER_PREPROCESSING", "m.pt.toml", says):
        load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu")


def test_patches_of_another_side_are_resized_as_said_or_refused(tmp_path: Path) -> None:
    digest = script(tmp_path / "m.pt", Pooled())
    with raises_reason("ENCODER_INPUT", "--patch-px 32"):
        load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu", probe_px=64)
    patches = random_patches(2, 64)
    for interpolation, resample in (
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ):
        resized = Preprocessing((0, 0, 0), (1, 1, 1), 32, interpolation).apply(patches) * 255
        for patch, mine in zip(patches, resized, strict=True):
            picture = Image.fromarray(patch.permute(1, 2, 0).numpy()).resize((32, 32), resample)
            theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert (theirs - mine).abs().max() <= 1.01  # what torchvision's transforms of a PIL image give
    whole = Preprocessing((0, 0, 0), (1, 1, 1), 64, "bicubic").apply(patches) * 255
    assert torch.equal(whole.round(), patches.float())


def test_a_network_in_half_precision_runs_in_float32_or_says_so(tmp_path: Path) -> None:
    network = nn.Sequential(Pooled(), nn.Linear(3, 2))
    digest = script(tmp_path / "m.pt", network.half())
    features = load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu").encode(random_patches(2, 32))
    assert features.dtype == torch.float32 and features.shape == (2, 2)
    digest = script(tmp_path / "m.pt", HalfInside())
    with raises_reason("ENCODER_WEIGHTS", "float32"):
        load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Maps(), "ENCODER_OUTPUT"),
        (Tokens(), "ENCODER_OUTPUT"),
        (Centred(), "ENCODER_BATCH"),
        (Logarithm(), "ENCODER_NOT_FINITE"),
        (Only224(), "ENCODER_INPUT"),
    ],
)
def test_torchscript_that_makes_no_features_is_refused_at_once(
    tmp_path: Path, network: nn.Module, reason: str
) -> None:
    digest = script(tmp_path / "m.pt", network)
    with pytest.raises(EncoderError) as error:
        load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu", probe_px=32)
    assert error.value.reason == reason


def test_torchscript_in_training_mode_is_put_into_evaluation(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), Pooled()).train()
    digest = script(tmp_path / "m.pt", network)
    encoder = load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu", probe_px=32)
    patches = random_patches(3, 32)
    torch.testing.assert_close(encoder.encode(patches)[:1], encoder.encode(patches[:1]))


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    digest = save(tmp_path / "m.pt", {"a": torch.zeros(1)})
    (tmp_path / "m.pt.toml").write_text(HALVES)
    with pytest.raises(EncoderError) as error:
        load_encoder("torchscript:x", tmp_path / "m.pt", digest, "cpu")
    assert error.value.reason == "ENCODER_WEIGHTS"


def test_devices_that_are_not_there() -> None:
    with pytest.raises(EncoderError):
        load_encoder("densenet121-random", device="abacus")
    if not torch.cuda.is_available():
        with raises_reason("ENCODER_UNKNOWN", "CUDA"):
            load_encoder("densenet121-random", device="cuda")
