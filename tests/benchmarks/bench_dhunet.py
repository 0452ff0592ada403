"""A training step of DHUnet beside its two encoders' and its decoder's alone.

    python -m tests.benchmarks.bench_dhunet [--batch 2] [--side-px 224] [--width 96] [--steps 5] [--threads 2]

A step is forward, backward and SGD with momentum, of the parts of one network at full size. The whole has the
loss with deep supervision; so has the decoder (fusion, head, auxiliary heads), which gets stored features and
gives their gradient. An encoder alone gets a stored gradient of its four maps. All take a step in turn in one
process, so that a busy machine is busy for all; the fastest. ``whole / sum`` is what joining the parts costs.
Where there is a CUDA device, it is measured too, a step until the device has finished.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from histoflare.masks.losses import segmentation_loss
from histoflare.masks.networks import build_network
from histoflare.masks.networks.dhunet import DHUnet, enlarge

CLASSES = 4
PARTS = ("Swin", "ConvNeXt", "decoder")


def steps_of(network: DHUnet, images: Tensor, masks: Tensor) -> dict[str, Callable[[], None]]:
    """Return what takes a step of the whole and of each part."""

    def optimizer_of(*parts: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for part in parts for parameter in part.parameters()]
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def whole(optimizer: torch.optim.Optimizer) -> None:
        segmentation_loss(network(images), masks, network.loss_weights).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def encoder(part: nn.Module, gradients: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        torch.autograd.backward(part(images), gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def decoder(maps: list[list[Tensor]], optimizer: torch.optim.Optimizer) -> None:
        local, context = [[each.detach().requires_grad_() for each in part] for part in maps]
        fused = network.fusion(local, context)
        outputs = [
            network.head(fused[3]),
            enlarge(network.supervision[2](fused[2]), 4),
            enlarge(network.supervision[0](fused[0]), 16),
        ]
        segmentation_loss(outputs, masks, network.loss_weights).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.no_grad():
        maps = [network.convnext(images), network.swin(images)]
    gradients = [1e-3 * torch.randn_like(each) for each in maps[1]]
    of_all, of_swin, of_convnext = map(optimizer_of, (network, network.swin, network.convnext))
    of_decoder = optimizer_of(network.fusion, network.head, network.supervision)
    return {
        "whole": lambda: whole(of_all),
        "Swin": lambda: encoder(network.swin, gradients, of_swin),
        "ConvNeXt": lambda: encoder(network.convnext, gradients, of_convnext),
        "decoder": lambda: decoder(maps, of_decoder),
    }


def seconds_of(steps: dict[str, Callable[[], None]], turns: int, device: str) -> dict[str, float]:
    """Return each one's shortest time; the first turn warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: min(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side-px", type=int, default=224)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{options.threads} thread(s), width {options.width}, batch {options.batch} at {options.side_px} px"
    )
    print(f"{'seconds':>8} {'whole':>8} {' '.join(f'{part:>9}' for part in PARTS)} {'whole / sum':>12}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        network = build_network("dhunet", CLASSES, width=options.width, seed=0).to(device)
        assert isinstance(network, DHUnet)
        size = (options.batch, 3, options.side_px, options.side_px)
        images = torch.randn(size, device=device)
        masks = torch.randint(0, CLASSES, (size[0], *size[2:]), device=device)
        found = seconds_of(steps_of(network, images, masks), options.steps, device)
        parts = [found[part] for part in PARTS]
        listed = " ".join(f"{part:>9.4f}" for part in parts)
        print(f"{device:>8} {found['whole']:>8.4f} {listed} {found['whole'] / sum(parts):>12.2f}")


if __name__ == "__main__":
    main()
