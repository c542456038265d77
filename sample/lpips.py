"""LPIPS, a perceptual distance between two pictures (Zhang et al. 2018, arXiv 1801.03924), with AlexNet.

Weights, two files: AlexNet's, as torchvision hands them out (alexnet-owt-7be5be79.pth), and the linear heads, as the
packages lpips (weights/v0.1/alex.pth) and torchmetrics (functional/image/lpips_models/alex.pth) ship them.
"""

from pathlib import Path as File

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import load_exactly, read_checkpoint
from .hub import locate

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LAYERS = {"0": (3, 64, 11, 4, 2), "3": (64, 192, 5, 1, 2), "6": (192, 384, 3, 1, 1)}
_LAYERS |= {"8": (384, 256, 3, 1, 1), "10": (256, 256, 3, 1, 1)}
"""AlexNet's convolutions by torchvision's numbers: channels in and out, size, stride, padding."""


class Lpips(nn.Module):
    """The distance (B,) of pictures to targets, both (B, 1 or 3, H, W) in [0, 1]; 0 for equals, lower is more alike."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict({name: nn.Conv2d(*about) for name, about in _LAYERS.items()})
        self.heads = nn.ParameterList([torch.ones(1, about[1], 1, 1) for about in _LAYERS.values()])
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, trunk: str | File, heads: str | File) -> "Lpips":
        """From the two files, or files on the Hub. FileNotFoundError; ValueError where they are not these weights."""
        trunk, heads, network = locate(trunk), locate(heads), cls()
        state = {key: value for key, value in read_checkpoint(trunk).items() if not key.startswith("classifier.")}
        linear = {f"heads.{key[3]}": value for key, value in read_checkpoint(heads).items() if key.startswith("lin")}
        load_exactly(network, state | linear, f"{trunk} with {heads}")
        return network.float().requires_grad_(False).eval()

    def forward(self, pictures: Tensor, target: Tensor) -> Tensor:
        distance = torch.zeros(len(pictures), device=pictures.device)
        for head, x, y in zip(self.heads, self._seen(pictures), self._seen(target), strict=True):
            distance = distance + (head * (x - y).square()).sum(1).mean((1, 2))
        return distance

    def _seen(self, pixels: Tensor) -> list[Tensor]:
        """What each layer makes of pixels, of unit length at every place."""
        shift, scale = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (_SHIFT, _SCALE))
        x, seen = (pixels.float().expand(-1, 3, -1, -1) * 2 - 1 - shift) / scale, []
        for name, layer in self.features.items():
            x = F.relu(layer(F.max_pool2d(x, 3, 2) if name in ("3", "6") else x))
            seen.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return seen
