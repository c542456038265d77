"""The hook that sends the unconditional part of a diffusers network's work to a prior."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .adapter_rows import AdapterRows
from .guidance import Prior
from .model import DiffusionModel
from .pipeline_prior import model_prior, network_prior
from .pipeline_table import Call, Row

HOOK = "prior_guidance"
"""The hook's name in diffusers' registry of a network."""
SHARED = {"image_rotary_emb"}
"""Arguments whose first dimension never is the batch, whatever its length."""


@contextmanager
def attached(network: nn.Module, hook: ModelHook) -> Iterator[None]:
    """`hook` on the network within it; the network's own attributes are afterwards as before."""
    known = hasattr(network, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(network)
    if HOOK in registry.hooks:
        raise ValueError("this pipeline is within prior_guidance already: leave that before another prior is taken")
    holder = vars(registry._module_ref)  # of a compiled network the wrapper, or what it wraps
    overridden = "forward" in holder
    registry.register_hook(hook, HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:  # a registry writes the network's own forward into the object, and stays itself
            if not overridden:
                holder.pop("forward", None)
            if not known:
                vars(getattr(network, "_orig_mod", network)).pop("_diffusers_hook", None)


def bound_call(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments by the names that the network's class gives them, whatever has been put around its forward."""
    kind: Any = type(getattr(network, "_orig_mod", network))  # of a compiled network
    bound = inspect.signature(kind.forward).bind(network, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


class Branch(StateManager):
    """The name that a pipeline has given the call in progress, by `cache_context`."""

    name: str | None = None

    def __init__(self) -> None:
        super().__init__(BaseState)

    def set_context(self, context: Any) -> None:
        self.name = getattr(context, "name", context)


class PriorHook(ModelHook):
    """Sends the unconditional rows, or the unconditional call, of one network to a prior."""

    _is_stateful = True  # else `cache_context` passes it by

    def __init__(
        self,
        pipe: Any,
        row: Row,
        network: nn.Module,
        prior: Any,
        null: Mapping[str, Tensor] | None,
        interval: tuple[float, float] | None,
        refresh: int,
    ):
        super().__init__()
        self.pipe, self.row, self.interval, self.refresh = pipe, row, interval, refresh
        self.branch = Branch()
        self.adapters: AdapterRows | None = None
        self.ask: Callable[[Call], Tensor]
        if prior == "base":
            if null:
                raise ValueError("prior 'base' takes the pipeline's own unconditional inputs: give no null")
            self.adapters, self.ask = AdapterRows(network), self._unadapted
        elif isinstance(prior, DiffusionModel | Prior):
            if null:
                raise ValueError("a DiffusionModel has its own null: give no null with it")
            self.ask = model_prior(pipe, row, prior)
        elif isinstance(prior, nn.Module):
            self.ask = network_prior(network, prior, null or {}, HOOK, row.channels)
        else:
            raise ValueError(f"prior must be a network, a DiffusionModel, a Prior or 'base', got {prior!r}")
        self.ran = self.asked = False
        self.t: float | None = None
        self.age = 0
        self.difference: Tensor | None = None
        self.conditional: Tensor | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        if self.adapters:
            self.adapters.attach()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        if self.adapters:
            self.adapters.detach()
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Pipelines call it after a picture; a next one is recognised by its first time in any case."""
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = bound_call(module, args, kwargs)
        self.ran = True
        if self.row.rungs is not None:
            if not self.row.guided(self.pipe, call):
                return self.fn_ref.original_forward(*args, **kwargs)
            out = self._batch(call, self.row.rungs)
        elif self.branch.name == self.row.branch:
            out = self._call(call)
        else:
            out = self.conditional = self._own(call)
        return Transformer2DModelOutput(sample=out) if call.get("return_dict", True) else (out,)

    def _own(self, call: Call) -> Tensor:
        return self.fn_ref.original_forward(**{**call, "return_dict": False})[0]

    def _unadapted(self, call: Call) -> Tensor:
        assert self.adapters is not None
        with self.adapters.without([True] * len(_sample(call))):
            return self._own(call)

    def _batch(self, call: Call, rungs: tuple[int, ...]) -> Tensor:
        """One batch of all rungs in their order."""
        size, left = divmod(len(_sample(call)), len(rungs))
        if left:
            raise ValueError(
                f"{type(self.pipe).__name__}'s row says a batch of {len(rungs)} parts, but it gives its network "
                f"{len(_sample(call))} rows: correct the row in PIPELINES"
            )
        step, upper = self._step(call), [rung for rung in rungs if rung]

        def take(kept: Sequence[int]) -> Call:
            places = [slice(i * size, (i + 1) * size) for i, rung in enumerate(rungs) if rung in kept]
            rows = size * len(rungs)
            return {k: v if k in SHARED else _rows(v, places, rows) for k, v in call.items()}

        if step == "off":
            top = self._own(take([max(rungs)]))
            return torch.cat([top] * len(rungs))
        if step == "ask" and self.adapters is not None:
            with self.adapters.without([rung == 0 for rung in rungs for _ in range(size)]):
                out = dict(zip(rungs, self._own(call).chunk(len(rungs)), strict=True))
        else:
            out = dict(zip(upper, self._own(take(upper)).chunk(len(upper)), strict=True))
            out[0] = self._again(out[1]) if step == "again" else _fitted(self.ask(take([0])), out[1], self.row)
        self._keep(step, out[1], out[0])
        return torch.cat([out[rung] for rung in rungs])

    def _call(self, call: Call) -> Tensor:
        """The unconditional call of its own; `conditional` is the one before it, at the same step."""
        step = self._step(call)
        if step != "ask" and self.conditional is None:
            raise ValueError(f"{type(self.pipe).__name__} makes its unconditional call first: no interval, no refresh")
        if step == "off":
            return self.conditional  # type: ignore[return-value]
        if step == "again":
            return self._again(self.conditional)  # type: ignore[arg-type]
        out = self.ask(call)
        if self.conditional is not None:
            out = _fitted(out, self.conditional, self.row)
            self._keep(step, self.conditional, out)
        return out

    def _step(self, call: Call) -> str:
        """What this step does: "ask" the prior, take the difference "again", or guidance is "off"."""
        self.asked = True
        if self.interval is None and self.refresh == 1:
            return "ask"
        t = float(torch.as_tensor(call["timestep"]).max())
        if self.t is None or t >= self.t:  # times fall within a picture: this is the next one
            self.difference = None
        self.t = t
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            return "off"
        if self.difference is None or self.age >= self.refresh:
            self.age = 1
            return "ask"
        self.age += 1
        return "again"

    def _again(self, upper: Tensor) -> Tensor:
        assert self.difference is not None
        return upper - self.difference

    def _keep(self, step: str, upper: Tensor, lower: Tensor) -> None:
        if step == "ask" and self.refresh > 1:
            self.difference = upper - lower


def _sample(call: Call) -> Tensor:
    return next(iter(call.values()))


def _rows(value: Any, places: Sequence[slice], rows: int) -> Any:
    """Those places of every tensor in `value` whose first dimension is the whole batch; all else as it is."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != rows:
            return value
        return value[places[0]] if len(places) == 1 else torch.cat([value[place] for place in places])
    if isinstance(value, Mapping):
        return {name: _rows(part, places, rows) for name, part in value.items()}
    return type(value)(_rows(part, places, rows) for part in value) if type(value) in (list, tuple) else value


def _fitted(out: Tensor, own: Tensor, row: Row) -> Tensor:
    """The prior's prediction in the type and with the channels of the own one: a learned variance stays the own."""
    have, need = out.shape[row.channels], own.shape[row.channels]
    out = out.to(own)
    if have < need:
        out = torch.cat([out, own.narrow(row.channels, have, need - have)], row.channels)
    return out.narrow(row.channels, 0, need)
