"""What may stand at the foot of a stock pipeline's ladder: another network, or a model of ours met at equal log-SNR."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .guidance import Prior, unconditional
from .latents import latent_space
from .model import DiffusionModel
from .noise import DiscretePath, FlowPath, Path, Prediction
from .pipeline_table import Call, Row
from .planning import device_and_dtype

CONTEXTS = ("cross_attention_dim", "caption_channels", "joint_attention_dim", "text_dim", "text_embed_dim")
"""The names, in diffusers' configs, of the width of what a network attends to."""


@dataclass(frozen=True)
class Latents:
    """What of a pipeline's own model a Prior is bound onto."""

    path: Path
    prediction: Prediction
    shape: tuple[int, ...]
    space: str
    ladder: tuple[frozenset[str], ...] = (frozenset(),)
    always: frozenset[str] = frozenset()


def network_prior(
    network: Any, prior: Any, null: Mapping[str, Tensor], hook: str, channels: int = 1
) -> Callable[[Call], Tensor]:
    """`prior` asked with the arguments of the pipeline's own network, past the hook of that name where it has it.

    channels: the dimension of the sample's channels. ValueError where the prior does not fit.
    """
    kind = type(getattr(network, "_orig_mod", network))  # of a compiled network
    if not isinstance(getattr(prior, "_orig_mod", prior), kind):
        raise ValueError(
            f"the prior must be a {kind.__name__}, as the pipeline's own network is, got {type(prior).__name__}: "
            "bind a network of another kind as a DiffusionModel"
        )
    if prior.training:
        raise ValueError(f"the prior, a {type(prior).__name__}, is in train mode: call eval() on it")
    if prior.dtype != network.dtype:
        raise ValueError(f"the pipeline's network computes in {network.dtype}, the prior in {prior.dtype}: convert it")
    parameters = inspect.signature(kind.forward).parameters
    if unknown := sorted(set(null) - set(parameters)):
        raise ValueError(f"null names {unknown}, but {kind.__name__} takes {sorted(parameters)}")
    own, other = network.config, prior.config
    for name in CONTEXTS:
        if own.get(name) != other.get(name) and "encoder_hidden_states" not in null:
            raise ValueError(
                f"the prior's {name} is {other.get(name)}, the pipeline's {own.get(name)}: give the prior's own null, "
                'null={"encoder_hidden_states": its encoding of the empty prompt}'
            )
    wide, narrow = own.get("in_channels"), other.get("in_channels")
    if wide is not None and narrow is not None and narrow > wide:
        raise ValueError(f"the prior takes {narrow} channels, the pipeline gives {wide}: choose one that takes fewer")

    def ask(call: Call) -> Tensor:
        (name, sample), rows = next(iter(call.items())), len(next(iter(call.values())))
        given = {key: _expanded(key, value, rows).to(sample) for key, value in null.items()}
        if narrow is not None and narrow != wide:
            sample = sample.narrow(channels, 0, narrow)
        return forward_of(prior, hook)(**{**call, name: sample, **given, "return_dict": False})[0]

    return ask


def forward_of(network: Any, hook: str) -> Callable[..., Any]:
    """The network's call without our hook, which its own network has when the prior is the pipeline's own."""
    registry = getattr(network, "_diffusers_hook", None)
    mine = registry.get_hook(hook) if registry is not None else None
    return mine.fn_ref.original_forward if mine is not None else network


def model_prior(pipe: Any, row: Row, prior: DiffusionModel | Prior) -> Callable[[Call], Tensor]:
    """`prior` asked at equal log-SNR, with its own null, its answer in the pipeline's prediction. ValueError where it
    does not fit; a UserWarning where its noise levels do not reach the pipeline's."""
    if isinstance(prior, Prior) and prior.keep:
        raise ValueError(f"the prior keeps {sorted(prior.keep)}, which a stock pipeline does not give it: keep nothing")
    model = prior.model if isinstance(prior, Prior) else prior
    if model.always:
        raise ValueError(f"{type(model).__name__} always needs {sorted(model.always)}, which the pipeline has not")
    if row.channels != 1:
        raise ValueError(f"{type(pipe).__name__} packs its latents: its prior must be a network of its own kind")
    if model.network.training:
        raise ValueError(f"the prior, a {type(model).__name__}, is in train mode: call eval() on it")
    bound = unconditional(model, onto=cast(DiffusionModel, latents_of(pipe, model, not isinstance(prior, Prior))))

    @torch.no_grad()
    def ask(call: Call) -> Tensor:
        sample = next(iter(call.values()))
        x_t = sample[:, : model.shape[0]].float()
        t = torch.as_tensor(call["timestep"]).detach().to("cpu", torch.float64).reshape(-1)
        t = _expanded("timestep", t, len(x_t))
        own_x_t, own_t = bound.locate(x_t, t)
        device, dtype = device_and_dtype(model)
        condition = {name: part.to(device) for name, part in bound.condition({}, len(x_t)).items()}
        out = model.denoise(own_x_t.to(device, dtype), own_t.to(device, torch.float32), condition)
        return bound.express(out.to(x_t), x_t, t)

    return ask


def latents_of(pipe: Any, model: DiffusionModel, check_space: bool) -> Latents:
    """What the pipeline's network works on, by its scheduler and its autoencoder; the latents' size is the prior's."""
    config, table = pipe.scheduler.config, getattr(pipe.scheduler, "alphas_cumprod", None)
    prediction = config.get("prediction_type", "epsilon")
    path: Path
    if table is None or prediction == "flow_prediction" or config.get("use_flow_sigmas"):
        path, prediction = FlowPath(config.num_train_timesteps), "flow_prediction"
    else:
        path, own = DiscretePath(table), model.path
        # Schedulers make their tables in float32: the model's own, where that is all the difference.
        if isinstance(own, DiscretePath) and own.scale is None and len(own) == len(path):
            path = own if torch.allclose(own.alphas_cumprod, path.alphas_cumprod, rtol=1e-4, atol=1e-6) else path
    vae = getattr(pipe, "vae", None)
    space = latent_space(vae) if isinstance(vae, AutoencoderKL) and check_space else model.space
    return Latents(path, prediction, model.shape, space)


def _expanded(name: str, value: Tensor, rows: int) -> Tensor:
    if len(value) not in (1, rows):
        raise ValueError(f"{name} must have one row, or {rows}, one per unconditional sample, got {len(value)}")
    return value.expand(rows, *value.shape[1:])
