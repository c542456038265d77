"""Guidance up a ladder of predictions, and any network as the prior at its foot.

Unconditional Priors Matter! (arXiv 2503.20240): p_0 + sum_k s_k (p_k - p_{k-1}), with p_0 from any network.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .model import Condition, DiffusionModel, keep_only
from .noise import convert, data_coefficients, data_scale, like, log_snr, split, weights

Scales = tuple[float, ...]
Arm = tuple[str, Scales]
"""A candidate prior's name, and the scales that it guides with, the lowest first."""

GUIDERS = {"apg": "AdaptiveProjectedGuidance", "cfg_zero_star": "ClassifierFreeZeroStarGuidance"}
"""Guiders of diffusers.guiders that take any two predictions: APG (arXiv 2410.02416), CFG-Zero* (arXiv 2503.18886)."""


def guide(ladder: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """p_0 + sum_k s_k (p_k - p_{k-1}), for predictions p_0..p_K from the least to the most conditioned.

    K = 1 is classifier-free guidance (arXiv 2207.12598, in the form uncond + s (cond - uncond): s = 1 is the
    conditional prediction); K = 2 is InstructPix2Pix's (arXiv 2211.09800, eq. 3). ValueError unless K scales.
    """
    if len(scales) != len(ladder) - 1:
        raise ValueError(f"a ladder of {len(ladder)} predictions takes {len(ladder) - 1} scales, got {len(scales)}")
    guided = ladder[0]
    for lower, upper, scale in zip(ladder, ladder[1:], scales, strict=False):
        guided = guided + scale * (upper - lower)
    return guided


def rungs(scales: Sequence[float]) -> tuple[list[int], list[float]]:
    """The rungs that `guide` gives any weight, and the scales between them.

    Rung k weighs s_k - s_{k+1} (with s_0 = 1, s_{K+1} = 0). A lowest scale of 1 needs no unconditional prediction;
    equal neighbours skip the rung between them.
    """
    padded = [1.0, *scales, 0.0]
    used = [k for k in range(len(padded) - 1) if padded[k] != padded[k + 1]]
    return used, [scales[k - 1] for k in used[1:]]


def rescale(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Moves the guided prediction's standard deviation per sample towards the conditional one's by phi in [0, 1].

    Lin et al. 2023 (arXiv 2305.08891, eqs. 15, 16).
    """
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (phi * factor + 1 - phi)


@dataclass(frozen=True, eq=False)
class Prior:
    """A network's prediction with all of the condition but `keep` at its null, bound onto another model.

    Made by `unconditional`. The self prior is the model bound onto itself.
    """

    model: DiffusionModel
    onto: DiffusionModel
    keep: frozenset[str] = frozenset()

    def condition(self, condition: Condition, batch: int) -> Condition:
        """The prior's own condition for a batch of the model's; what neither of the two ever drops, both have."""
        seen = self.keep | (self.model.always & self.onto.always)
        own = condition if self.model is self.onto else {name: condition[name] for name in seen}
        return keep_only(self.model, own, self.keep, batch)

    def locate(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t (B,) as the prior's own network takes them: at equal log-SNR, clamped to the range it knows."""
        if self.model.path == self.onto.path:
            return x_t, t
        alpha, sigma = data_coefficients(self.onto.path, t)
        own_t = self.model.path.time(log_snr(alpha, sigma))
        own_alpha, own_sigma = data_coefficients(self.model.path, own_t)
        return like(torch.hypot(own_alpha, own_sigma) / torch.hypot(alpha, sigma), x_t) * x_t, own_t

    def express(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prior network's output `out` at `locate(x_t, t)` as the bound model's prediction at x_t, t."""
        model, onto = self.model, self.onto
        alpha, sigma = onto.path.coefficients(t)
        if model.path == onto.path:
            return convert(out, x_t, model.prediction, onto.prediction, like(alpha, out), like(sigma, out))
        own_x_t, own_t = self.locate(x_t, t)
        own_alpha, own_sigma = model.path.coefficients(own_t)
        x_0, eps = split(model.prediction, out, own_x_t, like(own_alpha, out), like(own_sigma, out))
        x_0 = like(data_scale(onto.path, t) / data_scale(model.path, own_t), out) * x_0
        snr, own_snr = (log_snr(*data_coefficients(p.path, u)) for p, u in ((onto, t), (model, own_t)))
        clamped = (own_snr - snr).abs() > 1e-6
        # Beyond the prior's range only its x_0 is of use; eps is what then remains of x_t.
        alpha, sigma, clamped = like(alpha, out), like(sigma, out), like(clamped, out).bool()
        eps = torch.where(clamped, (x_t - alpha * x_0) / sigma, eps)
        a, b = weights(onto.prediction, alpha, sigma)
        return a * x_0 + b * eps


def unconditional(base: DiffusionModel, onto: DiffusionModel, keep: frozenset[str] = frozenset()) -> Prior:
    """`base` as the unconditional prior of `onto`, at equal log-SNR and in `onto`'s prediction.

    `keep` names condition parts that the prior still sees (none, as a rule). ValueError where the two are not
    comparable (other channels, other latents) or `keep` names a part that either lacks. A base whose noise levels
    do not reach `onto`'s is clamped to its own, with one UserWarning here.
    """
    if base.shape[0] != onto.shape[0] or len(base.shape) != len(onto.shape):
        raise ValueError(
            f"the prior works on x_0 of shape {base.shape}, the fine-tuned model on {onto.shape}: "
            "a prior must have the same channels; choose a base of the same latents"
        )
    if base.space != onto.space:
        raise ValueError(
            f"the prior's x_0 means {base.space!r}, the fine-tuned model's {onto.space!r}: predictions mix only in one "
            "latent space; choose a base with the same autoencoder"
        )
    for model in (base, onto):
        if lacking := keep - model.ladder[-1]:
            raise ValueError(f"keep names {sorted(lacking)}, but {type(model).__name__} has {sorted(model.ladder[-1])}")
    if base.path != onto.path:
        (base_low, base_high), (low, high) = base.path.log_snr_range(), onto.path.log_snr_range()
        if low < base_low - 1e-6 or high > base_high + 1e-6:
            warnings.warn(
                f"the prior {type(base).__name__} knows log-SNR {base_low:.2f} to {base_high:.2f}, the fine-tuned "
                f"model {low:.2f} to {high:.2f}: outside its range the prior is asked at its nearest noise level",
                stacklevel=2,
            )
    return Prior(base, onto, keep)


@dataclass(frozen=True, eq=False)
class Guidance:
    """How one candidate guides: which prior, how strongly, and where along the path.

    scales: one per rung of the model's ladder, the lowest first; uncond + s (cond - uncond), so 1 is conditional only.
    prior: None is the self prior.
    interval: (low, high) in the model's t; outside it the conditional prediction stands alone (arXiv 2404.07724).
    rescale: phi in [0, 1], see `rescale`.
    channels: so many of the first channels are guided, the rest are the conditional prediction's; None guides all. The
        authors of DiT guide 3 of 4.
    mix: the prior's share lambda in p_0 = (1 - lambda) own + lambda prior; below 1 both are evaluated.
    guider, guider_options: a name in GUIDERS in place of `guide` (one-rung ladders), and its own arguments.
    refresh: p_0 is asked for at every refresh-th guided step; between, p_1 - p_0 of the last time is taken again, with
        p_1 the rung above.
    """

    scales: tuple[float, ...]
    prior: Prior | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    guider: str | None = None
    guider_options: Mapping[str, Any] = field(default_factory=dict)
    channels: int | None = None
    mix: float = 1.0
    refresh: int = 1

    def check(self, model: DiffusionModel) -> None:
        """ValueError unless this guidance fits the model's ladder."""
        if not isinstance(self.scales, tuple | list):
            raise ValueError(f"scales must be a list of numbers, one per rung, got {self.scales!r}")
        if (rungs := len(model.ladder)) != len(self.scales):
            such = [1.5, *[7.5] * (rungs - 1)]
            typed = ":".join(map(str, such))
            raise ValueError(
                f"{type(model).__name__} has a ladder of {rungs} rung(s) "
                f"({', '.join('+'.join(sorted(keep)) for keep in model.ladder)}) and takes as many scales, "
                f"got {len(self.scales)}: {self.scales}"
                + (f"; such as {such}, on the command line {typed}" if rungs else "")
            )
        if self.prior is not None and not isinstance(self.prior, Prior):
            kind = type(self.prior).__name__
            raise ValueError(f"a prior is bound onto its model by unconditional(base, onto=model), got a bare {kind}")
        if self.prior is not None and self.prior.onto is not model:
            raise ValueError("the prior is bound onto another model; bind it with unconditional(base, onto=model)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must lie in [0, 1], the share of the prior, got {self.mix}")
        if not isinstance(self.refresh, int) or self.refresh < 1:
            raise ValueError(f"refresh must be 1 or more, every how many steps p_0 is asked for, got {self.refresh!r}")
        if self.channels is not None and not 1 <= self.channels <= model.shape[0]:
            raise ValueError(f"channels must be 1 to {model.shape[0]}, the channels of x_0, got {self.channels}")
        if self.guider is not None and self.guider not in GUIDERS:
            raise ValueError(f"guider must be one of {sorted(GUIDERS)}, got {self.guider!r}")
        if self.guider is not None and len(self.scales) != 1:
            raise ValueError(f"guider {self.guider!r} takes a ladder of one rung, this one has {len(self.scales)}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval must be (low, high) in the model's t, got {self.interval}")
        zeroed = self.guider == "cfg_zero_star" and self.guider_options.get("zero_init_steps", 1)
        if zeroed and model.prediction == "epsilon":  # x_0 = x_t / alpha: no velocity of zero
            raise ValueError(
                "cfg_zero_star begins with predictions of zero, which blow up as epsilon: "
                "give guider_options={'zero_init_steps': 0}"
            )

    def scales_at(self, t: float) -> tuple[float, ...]:
        """The scales in force at time t."""
        inside = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scales if inside else (1.0,) * len(self.scales)

    def make_guider(self) -> Any:
        """A fresh guider (it may hold a momentum), or None where `guide` does the work."""
        if self.guider is None:
            return None
        from diffusers import guiders

        guider = getattr(guiders, GUIDERS[self.guider])(guidance_scale=self.scales[0], **self.guider_options)
        guider.set_state(step=0, num_inference_steps=1, timestep=None)
        guider.prepare_inputs({})  # makes APG's momentum
        return guider


def combine(guidance: Guidance, predictions: Sequence[Tensor], scales: Sequence[float], guider: Any = None) -> Tensor:
    """The guided prediction of one candidate from the predictions on the rungs that it needs."""
    if len(predictions) == 1:
        return predictions[0]
    if guider is not None:
        out = guider.forward(pred_cond=predictions[1], pred_uncond=predictions[0])
        guided = out.pred if hasattr(out, "pred") else out[0]
    else:
        guided = guide(predictions, scales)
    if guidance.channels is not None:
        guided = torch.cat([guided[:, : guidance.channels], predictions[-1][:, guidance.channels :]], 1)
    return rescale(guided, predictions[-1], guidance.rescale) if guidance.rescale else guided
