"""EfficientNet-Lite0: the package's weights and no others, in the network they were made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histoflare.bags import encoder_names
from histoflare.bags.efficientnet import EfficientNetLiteFeatures, load_efficientnet
from histoflare.bags.encoder import load_encoder, load_encoder_of
from histoflare.bags.encoder_names import EFFICIENTNET, find_packaged_weights
from histoflare.errors import EncoderError

packaged = pytest.mark.skipif(find_packaged_weights() is None, reason="the extra demo is not installed")


@packaged
def test_its_features_are_those_of_the_weights() -> None:
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    assert encoder.id == "efficientnet-lite0:579344248a93" and encoder.features == 1280
    assert load_encoder_of(encoder.id, device="cpu").id == encoder.id
    patches = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = encoder.encode(patches)
    # ReLU6 and an average: from 0 to 6, and trained weights leave most of the 1280 quiet.
    assert found.shape == (2, 1280) and found.min() >= 0 and found.max() <= 6
    weights = find_packaged_weights()
    assert weights is not None
    own = EfficientNetLiteFeatures()
    load_efficientnet(own, weights.read_bytes(), "file")
    with torch.inference_mode():
        alone = own.eval()((patches[:1].float() - 127) / 128)
    assert torch.allclose(alone, found[:1], atol=1e-4)
    assert sum(p.numel() for p in own.parameters()) == 4_652_008 - 1_281_000, "without its classifier"


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(EncoderError) as caught:
        load_encoder(EFFICIENTNET, other)
    assert caught.value.reason == "ENCODER_HASH"
    with pytest.raises(EncoderError) as caught:
        load_efficientnet(EfficientNetLiteFeatures(), other.read_bytes(), "other.pth")
    assert caught.value.reason == "ENCODER_WEIGHTS"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_names, "find_packaged_weights", lambda: None)
    with pytest.raises(EncoderError) as caught:
        load_encoder(EFFICIENTNET)
    assert caught.value.reason == "ENCODER_WEIGHTS_MISSING" and "histoflare[demo]" in str(caught.value)
