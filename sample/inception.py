"""The network of the Fréchet inception distance: Inception v3 as FID was published with it, in torch.

Weights: pt_inception-2015-12-05-6726825d.pth, the translation of TensorFlow's graph of 2015 that pytorch-fid and
torch-fidelity hand out (the latter as weights-inception-2015-12-05-6726825d.pth); give its path.
"""

from pathlib import Path as File

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import load_exactly, read_checkpoint
from .hub import locate

SIDE = 299
_BRANCHES = {
    "A": {"branch1x1": "1", "branch5x5_": "1 5", "branch3x3dbl_": "1 3 3", "branch_pool": "1"},
    "C": {"branch1x1": "1", "branch7x7_": "1 1x7 7x1", "branch7x7dbl_": "1 7x1 1x7 7x1 1x7", "branch_pool": "1"},
}
"""The convolutions of a block's branches, as height x width, by the names in the weights' file."""


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU; as large as its input unless it strides or is unpadded."""

    def __init__(self, inside: int, outside: int, size: str, stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (int(side) for side in (size.split("x") * 2)[:2])
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # TensorFlow leaves the padding out of the mean.
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions; the last, "branch_pool", after a mean."""

    def __init__(self, kind: str, inside: int, widths: dict[str, list[int]]):
        super().__init__()
        self.chains = []
        for branch, sizes in _BRANCHES[kind].items():
            last, chain = inside, []
            for i, (size, width) in enumerate(zip(sizes.split(), widths[branch], strict=True), 1):
                chain.append(f"{branch}{i}" if branch.endswith("_") else branch)
                self.add_module(chain[-1], _Conv(last, width, size))
                last = width
            self.chains.append(chain)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            y = _average(x) if chain == ["branch_pool"] else x
            for name in chain:
                y = self.get_submodule(name)(y)
            out.append(y)
        return torch.cat(out, 1)


def _mixed_a(inside: int, pooled: int) -> _Mixed:
    widths = {"branch1x1": [64], "branch5x5_": [48, 64], "branch3x3dbl_": [64, 96, 96], "branch_pool": [pooled]}
    return _Mixed("A", inside, widths)


def _mixed_c(w: int) -> _Mixed:
    widths = {"branch7x7_": [w, w, 192], "branch7x7dbl_": [w, w, w, w, 192], "branch1x1": [192], "branch_pool": [192]}
    return _Mixed("C", 768, widths)


class _MixedB(nn.Module):
    """Halves the side: 288 channels to 768."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Conv(288, 384, "3", 2, padded=False)
        self.branch3x3dbl_1 = _Conv(288, 64, "1")
        self.branch3x3dbl_2 = _Conv(64, 96, "3")
        self.branch3x3dbl_3 = _Conv(96, 96, "3", 2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _MixedD(nn.Module):
    """Halves the side: 768 channels to 1280."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, "1")
        self.branch3x3_2 = _Conv(192, 320, "3", 2, padded=False)
        self.branch7x7x3_1 = _Conv(768, 192, "1")
        self.branch7x7x3_2 = _Conv(192, 192, "1x7")
        self.branch7x7x3_3 = _Conv(192, 192, "7x1")
        self.branch7x7x3_4 = _Conv(192, 192, "3", 2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class _MixedE(nn.Module):
    """To 2048 channels. `largest`: its pool takes the greatest instead of the mean, as the last block of 2015 does."""

    def __init__(self, inside: int, largest: bool):
        super().__init__()
        self.largest = largest
        self.branch1x1 = _Conv(inside, 320, "1")
        self.branch3x3_1 = _Conv(inside, 384, "1")
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, "1x3"), _Conv(384, 384, "3x1")
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inside, 448, "1"), _Conv(448, 384, "3")
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, "1x3"), _Conv(384, 384, "3x1")
        self.branch_pool = _Conv(inside, 192, "1")

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        threes = self.branch3x3_2a(three), self.branch3x3_2b(three)
        doubles = self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)
        return torch.cat([self.branch1x1(x), *threes, *doubles, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """FID's features (B, 2048) (Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017, arXiv 1706.08500).

    Without logits: its 1,008 outputs are ImageNet's classes in an order of their own, no data set's labels.
    """

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, "3", 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, "3", padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, "3")
        self.Conv2d_3b_1x1 = _Conv(64, 80, "1")
        self.Conv2d_4a_3x3 = _Conv(80, 192, "3", padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        self.Mixed_6a = _MixedB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_c, (128, 160, 160, 192))
        self.Mixed_7a = _MixedD()
        self.Mixed_7b, self.Mixed_7c = _MixedE(1280, largest=False), _MixedE(2048, largest=True)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str | File) -> "Inception":
        """From the weights' file, or a file on the Hub (owner/name/path/to/file); `fc` is not kept.

        FileNotFoundError; ValueError where names or shapes are not this network's.
        """
        path = locate(name)
        state = {key: tensor for key, tensor in read_checkpoint(path).items() if not key.startswith("fc.")}
        network = cls()
        for key in network.state_dict():  # older files lack the counters, which evaluation does not use
            if key.endswith("num_batches_tracked"):
                state.setdefault(key, torch.tensor(0))
        load_exactly(network, state, path)
        return network.float().requires_grad_(False).eval()

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 2048) from pixels (B, 1 or 3, H, W) in [0, 1]; rounded to whole 255ths, as published FIDs read files."""
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"pixels must have shape (B, 1 or 3, H, W), got {tuple(pixels.shape)}")
        x = (pixels.clamp(0, 1) * 255).round().expand(-1, 3, -1, -1)
        x = (_resize(_resize(x, 2), 3) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def _resize(x: Tensor, dim: int) -> Tensor:
    """One axis to SIDE, linearly, as TensorFlow 1 did: place i looks at i old / new, without half a pixel's shift."""
    old = x.shape[dim]
    place = torch.arange(SIDE, device=x.device) * (old / SIDE)
    low = place.long()
    share = (place - low).to(x.dtype).unflatten(0, (-1,) + (1,) * (3 - dim))
    below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=old - 1))
    return below + share * (above - below)
