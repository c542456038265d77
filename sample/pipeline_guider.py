"""Prior guidance in diffusers' Modular pipelines, as their guider."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .pipeline_hook import HOOK, attached, bound_call
from .pipeline_prior import network_prior
from .pipeline_table import Call


class PriorGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose unconditional pass is another network's: `pipe.update_components(guider=...)`.

    prior, null: a network and its own null, as for `prior_guidance`. The other arguments are those of diffusers'
    ClassifierFreeGuidance: pred = uncond + guidance_scale (cond - uncond); start, stop: the fractions of the steps
    between which it guides. The prior is not saved with a pipeline.
    """

    def __init__(
        self,
        prior: nn.Module,
        null: Mapping[str, Tensor] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
    ):
        super().__init__(guidance_scale, guidance_rescale, start=start, stop=stop)
        self._prior, self._null = prior, null or {}
        self._redirected = ExitStack()

    def new(self, **kwargs: Any) -> "PriorGuidance":
        """A copy with the same prior, and other values of ClassifierFreeGuidance's arguments."""
        names = ("guidance_scale", "guidance_rescale", "start", "stop")
        return PriorGuidance(self._prior, self._null, **{**{name: self.config[name] for name in names}, **kwargs})

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if not self.is_conditional:
            ask = network_prior(denoiser, self._prior, self._null, HOOK)
            self._redirected.enter_context(attached(denoiser, Redirect(ask, self._redirected)))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._redirected.close()


class Redirect(ModelHook):
    """Answers a network's next call by `ask`, having left the network: nothing stays on it where that fails."""

    def __init__(self, ask: Callable[[Call], Tensor], attached: ExitStack):
        super().__init__()
        self.ask, self.attached = ask, attached

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = bound_call(module, args, kwargs)
        self.attached.close()
        out = self.ask(call)
        return Transformer2DModelOutput(sample=out) if call.get("return_dict", True) else (out,)
