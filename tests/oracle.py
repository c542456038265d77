"""What the sampling tests share: an exact Gaussian-mixture denoiser, small models, and the schedulers."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from priorguide.sample.model import Condition, DiffusionModel
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.noise import DiscretePath, Path, Prediction, like, weights

# name, options, eta: every scheduler of a table, and every way in which one draws noise.
DETERMINISTIC = [(name, {}, 0.0) for name in ("ddim", "dpm++", "euler", "unipc")]
STOCHASTIC = [
    ("ddim", {}, 1.0),
    ("ddpm", {}, 0.0),
    ("dpm++", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    ("euler_ancestral", {}, 0.0),
]
TWO = {"text": torch.linspace(-1, 1, 12).reshape(4, 3), "image": torch.linspace(0, 1, 128).reshape(4, 2, 4, 4)}
"""A condition of `TwoRungs`, four rows."""


class Mixture(DiffusionModel):
    """x_0 ~ sum_k w_k N(mean_k, std_k^2), as (D, 1, 1) pictures; its predictions are exact, in float64 inside.

    Condition part "label" (B,): the component that x_0 is from; its null, K, is the whole mixture. `rows` lists the
    rows of every call of `denoise`.
    """

    ladder = (frozenset({"label"}),)
    space = "a plane"

    def __init__(
        self,
        means: Any = ((2.0, 0.0), (-1.0, 1.5), (-1.0, -1.5)),
        stds: Any = (0.3, 0.5, 0.4),
        shares: Any = (0.5, 0.3, 0.2),
        path: Path | None = None,
        prediction: Prediction = "v_prediction",
    ):
        super().__init__()
        self.means, self.stds, self.shares = (torch.tensor(v, dtype=torch.float64) for v in (means, stds, shares))
        self.network = nn.Identity()
        self.path = path or DiscretePath.cosine()
        self.prediction = prediction
        self.shape = (self.means.shape[1], 1, 1)
        self.rows: list[int] = []

    def posterior(self, x_t: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], each (B, D, 1, 1) float64."""
        alpha, sigma = (c.reshape(-1, 1, 1) for c in self.path.coefficients(t.double()))
        variance = alpha**2 * self.stds[:, None] ** 2 + sigma**2  # (B, K, 1) of x_t, given the component
        off = x_t.double().flatten(1)[:, None] - alpha * self.means  # (B, K, D)
        log_odds = self.shares.log() - (off**2 / variance).sum(2) / 2 - self.means.shape[1] / 2 * variance[..., 0].log()
        elsewhere = (label[:, None] != torch.arange(len(self.means))) & (label[:, None] < len(self.means))
        odds = log_odds.masked_fill(elsewhere, -torch.inf).softmax(1)[..., None]
        x_0 = (odds * (self.means + alpha * self.stds[:, None] ** 2 / variance * off)).sum(1)
        eps = (odds * sigma / variance * off).sum(1)
        return x_0[..., None, None], eps[..., None, None]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return pixels * 8 - 4

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        return {"label": batch["label"]}

    def null(self, condition: Condition) -> Condition:
        return {"label": torch.full_like(condition.get("label", torch.zeros(1, dtype=torch.long)), len(self.means))}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x_t))
        x_0, eps = self.posterior(x_t, t, condition["label"])
        a, b = weights(self.prediction, *(like(c, x_0) for c in self.path.coefficients(t.double())))
        return (a * x_0 + b * eps).to(x_t.dtype)

    def decode(self, x_0: Tensor) -> Tensor:
        return (x_0 / 8 + 0.5).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def tiny(cls) -> Self:
        return cls()


class TwoRungs(DiffusionModel):
    """A small random network with a ladder of two, as InstructPix2Pix has it: image, then image and text.

    Condition parts "text" (B, 3) and "image" (B, 2, 4, 4), null at zero. `rows` as in `Mixture`.
    """

    ladder = (frozenset({"image"}), frozenset({"image", "text"}))
    space = "nothing"
    shape = (2, 4, 4)

    def __init__(self, seed: int = 0, path: Path | None = None, prediction: Prediction = "v_prediction"):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.network = nn.ModuleDict({"picture": nn.Conv2d(4, 2, 3, padding=1), "words": nn.Linear(4, 2)})
        for parameter in self.network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        self.path, self.prediction = path or DiscretePath.linear(), prediction
        self.rows: list[int] = []

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return pixels * 2 - 1

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        return {name: batch[name] for name in ("text", "image")}

    def null(self, condition: Condition) -> Condition:
        empty = {"text": torch.zeros(1, 3), "image": torch.zeros(1, *self.shape)}
        return {name: torch.zeros_like(condition.get(name, part)) for name, part in empty.items()}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x_t))
        picture = self.network["picture"](torch.cat([x_t, condition["image"].to(x_t.dtype)], 1))
        words = torch.cat([condition["text"], t[:, None] / 1000], 1).to(x_t.dtype)
        return torch.tanh(picture + self.network["words"](words)[..., None, None])

    def decode(self, x_0: Tensor) -> Tensor:
        return (x_0 / 2 + 0.5).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def tiny(cls) -> Self:
        return cls()


def pixel_model(seed: int = 0, **options: Any) -> PixelUNet:
    """A small random PixelUNet, always the same for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"resolution": 16, "num_classes": 3, "image_channels": 1, "fold": 2} | options
        return PixelUNet.create(block_out_channels=(16, 32), **options).eval()


def pixel_condition(batch: int = 3) -> Condition:
    generator = torch.Generator().manual_seed(5)
    return {"label": torch.arange(batch) % 3, "image": torch.rand(batch, 1, 16, 16, generator=generator)}


def labels(value: int, batch: int) -> Condition:
    return {"label": torch.full((batch,), value)}


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Equal within `share` of the greatest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * max(1.0, float(expected.abs().max())))


def zero_terminal() -> DiscretePath:
    """Stable Diffusion's table, rescaled to end without signal (arXiv 2305.08891, algorithm 1)."""
    root = DiscretePath.scaled_linear().alphas_cumprod.sqrt()
    return DiscretePath(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
