"""Prior guidance in stock diffusers pipelines: the unconditional part of every batch goes to another network.

Unconditional Priors Matter! (arXiv 2503.20240). `with prior_guidance(pipe, prior): pipe(...)`.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .guidance import Guidance, Prior
from .model import DiffusionModel
from .pipeline_hook import PriorHook, attached
from .pipeline_table import row_of
from .published import factor

if TYPE_CHECKING:
    from .bundle import Bundle

Source = nn.Module | DiffusionModel | Prior | Literal["base"]


@contextmanager
def prior_guidance(
    pipe: Any,
    prior: Source | Sequence[Source | None],
    *,
    null: Mapping[str, Tensor] | None = None,
    interval: tuple[float, float] | None = None,
    refresh: int = 1,
) -> Iterator[Any]:
    """Within it, `pipe` takes its unconditional predictions from `prior`; afterwards nothing is left on it.

    The pipeline's own arguments stay as they are: guided = uncond + s (cond - uncond), with guidance_scale s (Flux and
    Qwen-Image: true_cfg_scale). Without guidance the pipeline is left alone. Of three predictions (InstructPix2Pix)
    the lowest alone is the prior's.

    prior: one of
      - a diffusers network of the class of the pipeline's own, with the same prediction and noise schedule. It is given
        what the pipeline's own would be, of the sample's channels the first that it takes;
      - a DiffusionModel, or a Prior of one, in the same latents: its own null, its noise met at equal log-SNR, and its
        prediction expressed in the pipeline's. For pipelines whose latents are (B, C, H, W);
      - "base": the pipeline's own network without its LoRA adapter, in one pass with the adapted rows.
      A pipeline of two networks (Wan 2.2) takes one for both, or one each; None leaves a network alone.
    null: arguments of a network's call, (1, ...) or (B, ...), that the prior gets in place of the pipeline's own
      unconditional ones: {"encoder_hidden_states": the prior's encoding of ""}.
    interval: (low, high) in the timesteps that the network is given; outside it the most conditioned prediction stands
      alone, in one evaluation (arXiv 2404.07724).
    refresh: the prior is asked at every refresh-th step; between, the difference of the last time is taken again.

    Yields the pipeline. ValueError for a pipeline that the table does not know, for a prior that does not fit, for use
    within itself. One UserWarning at the end if the pipeline ran and never asked for an unconditional prediction.
    """
    row = row_of(pipe)
    networks = [network for name in row.networks if (network := getattr(pipe, name, None)) is not None]
    priors = list(prior) if isinstance(prior, Sequence) and prior != "base" else [prior] * len(networks)
    if len(priors) != len(networks):
        raise ValueError(f"{type(pipe).__name__} has {len(networks)} network(s), got {len(priors)} priors: one each")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval must be (low, high) in the network's timesteps, got {interval}")
    if refresh < 1:
        raise ValueError(f"refresh must be at least 1, every how many steps the prior is asked, got {refresh}")
    if getattr(pipe, "_all_hooks", None):
        raise ValueError(
            "enable_model_cpu_offload takes hooks off a network after every picture: use enable_group_offload instead"
        )
    hooks = [
        (network, PriorHook(pipe, row, network, own, null, interval, refresh))
        for network, own in zip(networks, priors, strict=True)
        if own is not None
    ]
    with ExitStack() as stack:
        for network, hook in hooks:
            stack.enter_context(attached(network, hook))
        yield pipe
    if any(hook.ran for _, hook in hooks) and not any(hook.asked for _, hook in hooks):
        warnings.warn(
            f"{type(pipe).__name__} never asked for an unconditional prediction, so the prior had no part: give a "
            "guidance scale above 1 (Flux and Qwen-Image: true_cfg_scale, with a negative prompt)",
            stacklevel=3,
        )


STOCK = {
    "StableDiffusion": ("StableDiffusionPipeline", ("guidance_scale",)),
    "InstructPix2Pix": ("StableDiffusionInstructPix2PixPipeline", ("image_guidance_scale", "guidance_scale")),
}
"""By a model's class name: the pipeline of it, and what that calls the scales, the lowest first."""


def stock_pipeline(bundle: "Bundle") -> Any:
    """The stock diffusers pipeline of a bundle, its prior within: called, it samples as the bundle's recipe says.

    An instance of a subclass that does no more than fill in the recipe's scales, steps and eta where a call does not
    give them, and call the stock pipeline in `prior_guidance`. Its networks are the bundle's own, its scheduler a copy.
    A call with generator=[torch.Generator().manual_seed(seed), ...] draws the noise that `Bundle.sample` does.
    ValueError for a model, or a recipe, that no stock pipeline can follow.
    """
    import diffusers

    model, guidance, sampler = bundle.model, bundle.guidance, bundle.sampler
    if (name := type(model).__name__) not in STOCK:
        raise ValueError(f"there is no stock pipeline of a {name}, only of {sorted(STOCK)}: sample with Bundle.sample")
    if guidance is None or sampler is None:
        raise ValueError(f"{bundle.folder} holds a model without guidance: build its pipeline with diffusers")
    pipeline, words = STOCK[name]
    parts: Any = model
    if lacking := [part for part in ("vae", "text_encoder", "tokenizer") if getattr(parts, part) is None]:
        raise ValueError(f"the bundle's {name} came without {lacking}, which its pipeline needs")
    kind = getattr(diffusers, pipeline)
    recipe = {**_as_call(guidance, kind, words), "num_inference_steps": sampler.steps, "eta": sampler.eta}
    if name == "StableDiffusion":
        recipe |= {"height": model.shape[1] * factor(parts.vae), "width": model.shape[2] * factor(parts.vae)}
    if bundle.scheduler.config.prediction_type != model.prediction:
        raise ValueError(f"{type(bundle.scheduler).__name__} cannot take {model.prediction}, which the model predicts")
    pipe = _guided(kind, guidance, recipe)(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=model.network,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler = copy.deepcopy(bundle.scheduler)  # afterwards: the constructor changes what it is given
    return pipe


def _as_call(guidance: Guidance, kind: Any, words: Sequence[str]) -> dict[str, Any]:
    """The guidance as arguments of the pipeline's call. ValueError where it has none for a part of it."""
    recipe: dict[str, Any] = dict(zip(words, guidance.scales, strict=True))
    # Where the pipeline would not guide, its scales are those of the conditional prediction.
    guided = recipe["guidance_scale"] > 1 and all(scale >= 1 for scale in guidance.scales)
    whole = guidance.mix == 1 or guidance.prior is None
    if guidance.guider or guidance.channels is not None or not whole:
        raise ValueError(
            "the recipe has a guider, guided channels or a mix, which stock pipelines have not: use Bundle.sample"
        )
    if not guided and any(scale != 1 for scale in guidance.scales):
        raise ValueError(f"stock pipelines do not guide with scales below 1, the recipe has {guidance.scales}")
    if guidance.rescale:
        if "guidance_rescale" not in inspect.signature(kind.__call__).parameters:
            raise ValueError(f"{kind.__name__} has no guidance_rescale, the recipe has {guidance.rescale}")
        recipe["guidance_rescale"] = guidance.rescale
    return recipe


def _guided(kind: Any, guidance: Guidance, recipe: Mapping[str, Any]) -> Any:
    """The pipeline's class, called with the recipe and in its prior's guidance."""
    signature = inspect.signature(kind.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        kwargs |= {name: value for name, value in recipe.items() if name not in given}
        prior = self.unet if guidance.prior is None else guidance.prior
        with ExitStack() as stack:
            if guidance.prior is not None or guidance.interval is not None or guidance.refresh > 1:
                options: dict[str, Any] = {"interval": guidance.interval, "refresh": guidance.refresh}
                stack.enter_context(prior_guidance(self, prior, **options))
            return kind.__call__(self, *args, **kwargs)

    # The stock name: folders that it saves name the stock class, and the table knows it.
    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__})
