"""The candidates of a comparison: whose unconditional prediction guides, how, and at which scales."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .adapter_rows import unadapted
from .checkpoint import read_checkpoint
from .guidance import Arm, Guidance, Prior, Scales, unconditional
from .loop import Sampler
from .model import DiffusionModel, with_network


@dataclass
class Candidate:
    """One way to guide a model.

    prior: the network at the foot of the ladder; None is the model itself, "base" its own network with the adapter off.
    checkpoint, weights: in place of a prior, the model as an earlier checkpoint of its run has it, averaged or live.
    keep: condition parts that the prior still sees, such as the image of an edit.
    mix: the prior's share in p_0, the rest is the model's own.
    scales: a grid of its own. interval, channels: its own. rescale, guider, guider_options, refresh: see `Guidance`.
    """

    prior: DiffusionModel | Literal["base"] | None = None
    checkpoint: str | None = None
    weights: Literal["average", "model"] = "average"
    keep: tuple[str, ...] = ()
    mix: float = 1.0
    scales: list[float] | list[list[float]] | None = None
    interval: tuple[float, float] | None = None
    channels: int | None = None
    rescale: float = 0.0
    guider: str | None = None
    guider_options: dict[str, Any] = field(default_factory=dict)
    refresh: int = 1

    def bind(self, model: DiffusionModel) -> Prior | None:
        """The prior bound onto the model, and its network as it now is; None where it is the model's own. ValueError
        where it does not fit."""
        if self.prior is not None and self.checkpoint is not None:
            raise ValueError("a candidate has either a prior or a checkpoint, got both")
        base = model if self.prior is None else unadapted(model) if self.prior == "base" else self.prior
        if self.checkpoint is not None:
            base = at_checkpoint(model, self.checkpoint, self.weights)
        plain = base is model and not self.keep
        return None if plain else unconditional(base, onto=model, keep=frozenset(self.keep))

    def guidance(self, scales: Scales, prior: Prior | None) -> Guidance:
        options = (self.interval, self.rescale, self.guider, self.guider_options, self.channels, self.mix)
        return Guidance(scales, prior, *options, refresh=self.refresh)


def grid(scales: Sequence[float] | Sequence[Sequence[float]]) -> list[Scales]:
    """Scales as tuples, a number being a ladder of one rung."""
    return [(float(s),) if isinstance(s, int | float) else tuple(map(float, s)) for s in scales]


def arms(
    candidates: Mapping[str, Candidate],
    bound: Mapping[str, Prior | None],
    scales: Sequence[float] | Sequence[Sequence[float]],
    override: bool = False,
) -> dict[Arm, Guidance]:
    """Every candidate at every scale of its own grid, or of `scales` where it has none, or if `override`."""
    found: dict[Arm, Guidance] = {}
    for name, candidate in candidates.items():
        own = scales if override or candidate.scales is None else candidate.scales
        found |= {(name, at): candidate.guidance(at, bound[name]) for at in grid(own)}
    return found


def check_interval(name: str, guidance: Guidance, sampler: Sampler, model: DiffusionModel) -> None:
    """ValueError where the candidate's interval holds none of the sampler's steps, so that nothing would be guided."""
    scheduler = sampler.make(model)
    scheduler.set_timesteps(sampler.steps)
    times = scheduler.timesteps.tolist()
    if guidance.interval and not any(guidance.interval[0] <= t <= guidance.interval[1] for t in times):
        raise ValueError(
            f"{name}'s interval {list(guidance.interval)} holds none of the {len(times)} steps, which lie from "
            f"{min(times):g} to {max(times):g} in the model's t: it would guide nothing"
        )


def at_checkpoint(model: DiffusionModel, path: str, weights: Literal["average", "model"]) -> DiffusionModel:
    """The model as a training checkpoint has it. FileNotFoundError, ValueError where it is another network's."""
    start = {"average": "average.", "model": "model.network."}[weights]
    held = read_checkpoint(path).get("state_dict", {})
    state = {name.removeprefix(start): value for name, value in held.items() if name.startswith(start)}
    network = copy.deepcopy(model.network).requires_grad_(False).eval()
    try:
        left = network.load_state_dict(state, strict=False)  # an adapter's run keeps what it trains alone
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} holds another network than the run's: {reason}") from error
    if not state or left.unexpected_keys:
        raise ValueError(f"{path} holds no {weights} weights of this network ({start}*)")
    return with_network(model, network)
