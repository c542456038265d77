"""Where stock diffusers pipelines ask for their unconditional prediction, one row per pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = dict[str, Any]
"""The arguments of one call of a network, by name; the first is the sample (B, ...)."""


def by_property(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether a call is guided, where the pipeline tells by `do_classifier_free_guidance`.

    A pass without some layers (Stable Diffusion 3's skip-layer guidance) is a call of its own, and is not.
    """
    return bool(pipe.do_classifier_free_guidance) and call.get("skip_layers") is None


def by_equal_halves(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether a call is guided, where the pipeline does not tell: then the sample's halves are equal.

    So they also are without guidance if both halves of a batch were given the same noise.
    """
    sample = next(iter(call.values()))
    halves = sample.chunk(2)
    return len(sample) % 2 == 0 and torch.equal(halves[0], halves[1])


@dataclass(frozen=True)
class Row:
    """How one pipeline asks for its predictions.

    networks: the pipeline's attributes that hold its denoisers.
    rungs: the parts of one batch in order, each by its rung on the ladder, 0 being the unconditional one: (0, 1) is
        [uncond, cond]. None where each prediction has a call of its own; then
    branch: the name that the pipeline gives the unconditional call in `cache_context`, after the conditional one.
    guided: (pipe, call) -> whether the batch of this call has those parts.
    channels: the dimension of the sample's channels.
    """

    networks: tuple[str, ...]
    rungs: tuple[int, ...] | None = None
    branch: str | None = None
    guided: Callable[[Any, Mapping[str, Any]], bool] = by_property
    channels: int = 1

    def __post_init__(self) -> None:
        if (self.rungs is None) == (self.branch is None):
            raise ValueError("a row has either rungs, the order of one batch, or branch, the name of a call")
        if self.rungs is not None and sorted(self.rungs) != list(range(len(self.rungs))):
            raise ValueError(f"rungs must be 0 to K in the batch's order, got {self.rungs}")


PIPELINES: dict[str, Row] = {
    "StableDiffusionPipeline": Row(("unet",), (0, 1)),
    "StableDiffusionImg2ImgPipeline": Row(("unet",), (0, 1)),
    "StableDiffusionXLPipeline": Row(("unet",), (0, 1)),
    "StableDiffusionInstructPix2PixPipeline": Row(("unet",), (2, 1, 0)),
    "StableVideoDiffusionPipeline": Row(("unet",), (0, 1), channels=2),
    "DiTPipeline": Row(("transformer",), (1, 0), guided=by_equal_halves),
    "PixArtAlphaPipeline": Row(("transformer",), (0, 1), guided=by_equal_halves),
    "StableDiffusion3Pipeline": Row(("transformer",), (0, 1)),
    "SanaPipeline": Row(("transformer",), (0, 1)),
    "CogVideoXPipeline": Row(("transformer",), (0, 1), guided=by_equal_halves, channels=2),
    "LTXPipeline": Row(("transformer",), (0, 1), channels=2),
    "WanPipeline": Row(("transformer", "transformer_2"), branch="uncond"),
    "FluxPipeline": Row(("transformer",), branch="uncond", channels=2),
    "QwenImagePipeline": Row(("transformer",), branch="uncond", channels=2),
}
"""By the pipeline's class name. A row of your own: `PIPELINES["MyPipeline"] = Row(("unet",), (0, 1))`."""


def row_of(pipe: Any) -> Row:
    """The pipeline's row. ValueError, with how to write one, for a pipeline that has none."""
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise ValueError(
            f"where {name} asks for its unconditional prediction is not known: describe it in "
            f'priorguide.sample.pipeline_table, PIPELINES["{name}"] = Row(("transformer",), (0, 1)) for one batch of '
            '[uncond, cond], or Row(("transformer",), branch="uncond") for calls of their own in cache_context'
        )
    return PIPELINES[name]
