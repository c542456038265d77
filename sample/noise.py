"""Noise paths, and the one table that turns any prediction into any other.

A path is x_t = alpha(t) x_0 + sigma(t) eps. Every network predicts a x_0 + b eps, with (a, b) from `weights`;
the same pair is the training target. Times are in the units that the network is given (0 to 1000 as a rule).

A path may scale the data: then z_0 = s(t) x_0 stands in the place of x_0 in all of this, and `data_scale` gives s.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
"""What a network predicts, in the words of diffusers' scheduler configs."""


def weights(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) such that the prediction is a x_0 + b eps.

    epsilon (0, 1), sample (1, 0), v (-sigma, alpha) (Salimans & Ho 2022, arXiv 2202.00512, app. D), flow (-1, 1)
    (Lipman et al. 2023, arXiv 2210.02747). `alpha`, `sigma`: any one shape. ValueError for another name.
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match prediction:
        case "epsilon":
            return zero, one
        case "sample":
            return one, zero
        case "v_prediction":
            return -sigma, alpha
        case "flow_prediction":
            return -one, one
    raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {prediction!r}")


def split(prediction: Prediction, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from a prediction `out` at x_t: the 2x2 solve of x_t = alpha x_0 + sigma eps, out = a x_0 + b eps.

    All shapes broadcast. The solve is singular for epsilon at alpha = 0 and for sample at sigma = 0: there the
    prediction says nothing about the other part, and the result is not finite.
    """
    a, b = weights(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a
    return (b * x_t - sigma * out) / determinant, (alpha * out - a * x_t) / determinant


def convert(out: Tensor, x_t: Tensor, source: Prediction, target: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The same prediction in another parametrisation, at the same x_t and noise level."""
    if source == target:
        return out
    x_0, eps = split(source, out, x_t, alpha, sigma)
    a, b = weights(target, alpha, sigma)
    return a * x_0 + b * eps


def add_noise(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps; alpha and sigma of shape (B,), or anything that `like` takes."""
    return like(alpha, x_0) * x_0 + like(sigma, x_0) * eps


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A (B,) coefficient as (B, 1, ..., 1), in the type and on the device of x (B, ...)."""
    if coefficient.shape != x.shape[:1]:
        raise ValueError(f"coefficient must have shape ({x.shape[0]},), got {tuple(coefficient.shape)}")
    return coefficient.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Path(Protocol):
    """x_t = alpha(t) x_0 + sigma(t) eps, for t of shape (B,) in the units that the network is given."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t), each (B,), on t's device, in float64 where the device has it."""

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which log(alpha^2 / sigma^2) is `log_snr` (B,), clamped to the path's own range."""

    def log_snr_range(self) -> tuple[float, float]:
        """The least and the greatest log-SNR that the network was trained at."""

    def draw(self, u: Tensor) -> Tensor:
        """Training times from u (B,), uniform on [0, 1): t whose distribution is the path's uniform one."""

    def scheduler_config(self) -> dict[str, Any]:
        """The keyword arguments by which a diffusers scheduler follows this path."""


class DiscretePath:
    """A variance-preserving path given by its table of alpha-bar at t = 0 .. T-1 (DDPM, arXiv 2006.11239, eq. 4).

    Between the table's times the angle atan2(sigma, alpha) is linear: finite everywhere, zero-terminal SNR
    included, exact at whole t, and invertible, so that another network's noise level is met at a continuous t.
    """

    def __init__(
        self,
        alphas_cumprod: Sequence[float] | Tensor,
        scale: Sequence[float] | Tensor | None = None,
        ends_scaled: bool = False,
        **scheduler_config: Any,
    ):
        """`alphas_cumprod`: (T,), falling, in [0, 1]. ValueError otherwise. `scheduler_config`: the same table in a
        diffusers scheduler's words, where it has a name there.

        scale: (T,), above 0 and never rising, what the data are multiplied by; None is 1. Its log-SNR is that of x_0.
        ends_scaled: a sampler's last step leaves the data as they are scaled at its last time, in place of at t = 0.
        """
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must have shape (T,) with T >= 2, got {tuple(table.shape)}")
        if not ((table.diff() < 0).all() and table[-1] >= 0 and table[0] <= 1):
            raise ValueError("alphas_cumprod must fall from at most 1 to at least 0")
        self.alphas_cumprod, self.ends_scaled = table, ends_scaled
        self.scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float64)
        if self.scale is not None and not (
            self.scale.shape == table.shape and (self.scale > 0).all() and (self.scale.diff() <= 0).all()
        ):
            raise ValueError(f"scale must have shape ({len(table)},), be above 0 and never rise")
        self._config = scheduler_config
        signal = table.sqrt() if self.scale is None else table.sqrt() * self.scale
        angles = torch.atan2((1 - table).sqrt(), signal)  # of x_0, whose SNR other paths are met at
        tables = {"angles": angles, "posterior": _posterior(table), "scale": self.scale}
        self._tables = {(name, "cpu"): values for name, values in tables.items() if values is not None}

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor, **scheduler_config: Any) -> "DiscretePath":
        return cls(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0), **scheduler_config)

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> "DiscretePath":
        """DDPM's and DiT's schedule: betas evenly spaced."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls.from_betas(betas, beta_schedule="linear", beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> "DiscretePath":
        """Stable Diffusion's schedule: square roots of betas evenly spaced."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls.from_betas(betas, beta_schedule="scaled_linear", beta_start=beta_start, beta_end=beta_end)

    def scaling(
        self, least: float = 1.0, over: int = 400, zero_terminal_snr: bool = False, ends_scaled: bool = False
    ) -> "DiscretePath":
        """This path with data scaled from 1 down to `least` along the first `over` steps, as VideoCrafter has it.

        zero_terminal_snr: its sqrt(alpha-bar) shifted and scaled to end at 0 (Lin et al. 2023, arXiv 2305.08891,
        alg. 1). ends_scaled: see the constructor.
        """
        table, config = self.alphas_cumprod, self._config
        if zero_terminal_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            config = {**config, "rescale_betas_zero_snr": True}
        scale = torch.full_like(table, least)
        scale[:over] = torch.linspace(1, least, over, dtype=torch.float64)
        return DiscretePath(table, None if least == 1 else scale, ends_scaled, **config)

    @classmethod
    def cosine(cls, steps: int = 1000) -> "DiscretePath":
        """Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17), betas at most 0.999: diffusers' squaredcos_cap_v2."""

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
        return cls.from_betas(betas, beta_schedule="squaredcos_cap_v2")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DiscretePath)
            and len(self) == len(other)
            and torch.allclose(self.alphas_cumprod, other.alphas_cumprod, rtol=1e-6, atol=1e-9)
            and torch.allclose(self._table("angles"), other._table("angles"), rtol=1e-6, atol=1e-9)
        )

    def __hash__(self) -> int:
        return hash(len(self))

    def _table(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Kept on each device that has asked for it: to copy it at every step would wait for the device."""
        if (key := (name, str(device))) not in self._tables:
            dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # MPS has no float64
            self._tables[key] = self._tables[name, "cpu"].to(device, dtype)
        return self._tables[key]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angles = self._table("angles", t.device)
        t = t.to(angles.dtype).clamp(0, len(self) - 1)
        below = t.long().clamp(max=len(self) - 2)
        angle = torch.lerp(angles[below], angles[below + 1], t - below)
        if self.scale is not None:
            angle = torch.atan2(self.scale_at(t) * angle.sin(), angle.cos())
        return angle.cos(), angle.sin()

    def scale_at(self, t: Tensor) -> Tensor:
        """s(t), what the data are multiplied by: 1 where no `scale` was given."""
        t = t.to(self._table("angles", t.device).dtype)
        if self.scale is None:
            return torch.ones_like(t)
        scale = self._table("scale", t.device)
        below = t.long().clamp(0, len(self) - 2)
        return torch.lerp(scale[below], scale[below + 1], (t - below).clamp(0, 1))

    def posterior(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of q(x_{t-1} | x_t, x_0) at whole t (B,), each (B,): its log variance, log beta_t, and the share of x_0 in
        its mean (Ho et al. 2020, arXiv 2006.11239, eqs. 6, 7). Its variance at t = 0, zero, is given as that at 1."""
        return tuple(self._table("posterior", t.device)[:, t])  # type: ignore[return-value]

    def time(self, log_snr: Tensor) -> Tensor:
        angles = self._table("angles", log_snr.device)
        angle = torch.atan(torch.exp(-log_snr.to(angles.dtype) / 2)).clamp(angles[0], angles[-1])
        above = torch.searchsorted(angles, angle).clamp(1, len(self) - 1)
        low, high = angles[above - 1], angles[above]
        return above - 1 + (angle - low) / (high - low)

    def log_snr_range(self) -> tuple[float, float]:
        angles = self._table("angles")[[-1, 0]]
        return tuple((-2 * angles.tan().log()).tolist())  # type: ignore[return-value]

    def draw(self, u: Tensor) -> Tensor:
        return (u * len(self)).long().clamp(max=len(self) - 1)

    def scheduler_config(self) -> dict[str, Any]:
        if self._config:
            return {"num_train_timesteps": len(self), **self._config}
        alphas = self.alphas_cumprod
        betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
        return {"num_train_timesteps": len(self), "trained_betas": betas.tolist()}


def _posterior(alphas_cumprod: Tensor) -> Tensor:
    """(3, T): see `DiscretePath.posterior`."""
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    beta = 1 - alphas_cumprod / before
    variance = beta * (1 - before) / (1 - alphas_cumprod)
    variance[0] = variance[1]  # its own has no logarithm
    return torch.stack([variance.log(), beta.log(), before.sqrt() * beta / (1 - alphas_cumprod)])


class FlowPath:
    """The straight path x_t = (1 - t/T) x_0 + (t/T) eps of flow matching (arXiv 2209.03003), t in [0, T]."""

    def __init__(self, steps: int = 1000):
        self.steps = steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowPath) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.to(torch.float32 if t.device.type == "mps" else torch.float64) / self.steps
        return 1 - sigma, sigma

    def time(self, log_snr: Tensor) -> Tensor:
        return self.steps * torch.sigmoid(-log_snr / 2)  # alpha / sigma = exp(log_snr / 2)

    def log_snr_range(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def draw(self, u: Tensor) -> Tensor:
        return u * self.steps

    def scheduler_config(self) -> dict[str, Any]:
        return {"num_train_timesteps": self.steps}


def data_scale(path: Path, t: Tensor) -> Tensor:
    """s(t) (B,) of a path that scales the data, z_0 = s(t) x_0: 1 for any other."""
    return path.scale_at(t) if isinstance(path, DiscretePath) else torch.ones_like(t)


def data_coefficients(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """What x_0 itself and eps are multiplied by in x_t, each (B,): alpha(t) s(t), sigma(t)."""
    alpha, sigma = path.coefficients(t)
    return alpha * data_scale(path, t).to(alpha), sigma


def rescaled(
    path: DiscretePath, prediction: Prediction, out: Tensor, x_t: Tensor, t: Tensor, following: float | None
) -> tuple[Tensor, Tensor]:
    """The prediction and x_t at t (B,) with z_0 scaled as it will be at the time `following`, None after the last step:
    a sampler that is given these steps to its next time with the data in that time's scale."""
    alpha, sigma = (like(c, out) for c in path.coefficients(t))
    z_0, eps = split(prediction, out, x_t, alpha, sigma)
    after = t if following is None and path.ends_scaled else torch.full_like(t, following or 0.0)
    z_0 = like(path.scale_at(after) / path.scale_at(t), out) * z_0
    a, b = weights(prediction, alpha, sigma)
    return a * z_0 + b * eps, alpha * z_0 + sigma * eps


def log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2); -inf where alpha is 0, inf where sigma is 0."""
    return 2 * (alpha.log() - sigma.log())
