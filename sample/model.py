"""The one abstract class: a network with its path, its prediction, its conditions and their null."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .noise import Path, Prediction

Condition = dict[str, Tensor]
"""Named parts of a condition, each (B, ...); cached encodings look the same as fresh ones."""


class DiffusionModel(nn.Module, ABC):
    """A conditional diffusion model: all that training, sampling, comparison and bundles need to know of one.

    A subclass sets the attributes below and defines `encode_pixels` (or `posterior`), `encode_condition`, `null`,
    `denoise`, `decode`, `config`, `tiny`.
    """

    network_name: ClassVar[str] = "unet"
    """The network's folder in a bundle: diffusers' word for it, "unet" or "transformer"."""

    added: ClassVar[tuple[str, ...]] = ()
    """How the names of those network parameters begin that a base does not have: adapters train them in full."""
    published_as: ClassVar[tuple[str, ...]] = ()
    """Class names, of pipelines and of networks, by which diffusers folders say that they hold this model."""

    network: nn.Module
    """All that training changes; every other module is frozen and in eval mode."""
    path: Path
    prediction: Prediction
    ladder: tuple[frozenset[str], ...]
    """The condition parts kept on rungs 1..K; rung 0 is unconditional. One rung is classifier-free guidance."""
    always: frozenset[str] = frozenset()
    """The condition parts that are never dropped and on no rung of the ladder: `null` leaves them as they are."""
    shape: tuple[int, ...]
    """One x_0, without the batch: (C, H, W), or (C, F, H, W) where there is time."""
    side_step: int | None = None
    """Training pixels may have any sides that are multiples of it, beside those of `shape`; None: only `shape`'s."""
    space: str
    """Names what x_0 means (the autoencoder and its scale): predictions mix only within one space."""
    licence: str | None = None
    """What weights of this kind were published under, where it is known: `from_pretrained` sets it, fine-tunes and
    bundles carry it on."""
    learned_range: bool = False
    """Whether the network also predicts its reverse variance, which `denoise_with_variance` then gives."""

    def train(self, mode: bool = True) -> Self:
        """Only the network ever trains: every other module stays in eval mode."""
        super().train(False)
        self.training = mode
        self.network.train(mode)
        return self

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """A batch of data as (x_0 (B, *shape), condition). Pixels come as "pixels" (B, C, H, W) in [0, 1].

        Of samples that were encoded before, it is {"posterior": `posterior`'s, "condition": `encode_condition`'s}.
        """
        if "posterior" in batch:
            return self.draw(batch["posterior"]), dict(batch["condition"])
        return self.encode_pixels(batch["pixels"]), self.encode_condition(batch)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] as x_0 (B, *shape): while training a draw from the `posterior`, where there is
        one, otherwise its mean."""
        return self.draw(self.posterior(pixels))

    def posterior(self, pixels: Tensor) -> Tensor:
        """All that must be kept of pixels to `draw` x_0 time and again: x_0 itself, or, where an autoencoder is unsure,
        its mean and deviation (B, 2C, ...) in x_0's units. A subclass defines this or `encode_pixels`."""
        return self.encode_pixels(pixels)

    def draw(self, posterior: Tensor) -> Tensor:
        """x_0 (B, *shape) of a `posterior`, whose normal noise is drawn anew while training."""
        if posterior.shape[1] == self.shape[0]:
            return posterior
        mean, deviation = posterior.contiguous().chunk(2, 1)
        if not self.training:
            return mean
        # randn_like would draw otherwise for another layout in memory, which a cache does not keep
        return mean + deviation * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)

    @abstractmethod
    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """The condition of a batch of data, which needs no pixels of its own to be there."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The condition with every droppable part replaced by its null, and parts that are absent filled in.

        Parts of `condition` keep their batch size; absent ones get a batch of one, which expands. Parts in `always`
        stay as they are. The only definition of "unconditional": drop-out, sampling and bundles all call it.
        """

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction at x_t (B, *shape), t (B,) in the network's units; same shape as x_t."""

    def denoise_with_variance(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the learned range v of the log variance: -1 is the posterior's, 1 is log beta_t.

        Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 15), with v moved from [0, 1]; None without `learned_range`.
        """
        return self.denoise(x_t, t, condition), None

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 (B, *shape) as pixels (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What besides its components makes this model: keyword arguments of `from_components`, as JSON."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """Random weights, a second on a CPU, no download: for tests and trial runs."""

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """What an original checkpoint file with tensors of these names and shapes is to this model's
        `from_pretrained`, in a few words ("SD 1.x, live and averaged weights"); None where it is nothing to it."""
        return None

    @classmethod
    def from_components(cls, network: nn.Module, **config: Any) -> Self:
        """The model from its loaded network and its `config()`."""
        return cls(network, **config)

    @classmethod
    def load_network(cls, folder: str) -> nn.Module:
        """The network from its folder, as `network.save_pretrained` wrote it; UNet2DModel and kin by default."""
        import json
        from pathlib import Path as File

        import diffusers

        name = json.loads((File(folder) / "config.json").read_text())["_class_name"]
        network_class: Any = getattr(diffusers, name, None)
        known = isinstance(network_class, type) and issubclass(network_class, diffusers.ModelMixin)
        if not known:
            raise ValueError(f"{folder}/config.json must name a diffusers model class, got {name!r}")
        return network_class.from_pretrained(folder, use_safetensors=True, local_files_only=True)

    def stock_network(self, times: Tensor) -> nn.Module:
        """The network in diffusers' own class, where that is another one, as near as it comes: at `times` (N,) of the
        path in the first place. ValueError where there is nothing to convert."""
        raise ValueError(
            f"{type(self).__name__} is not converted: what diffusers has of its parts opens from the bundle as it is"
        )

    def read_condition(self, **values: str) -> dict[str, Any]:
        """A batch of one, to be encoded, from the command line's `--condition name=value`: "text" is a prompt, whole
        numbers are labels, the rest paths of pictures. ValueError for a name that the model does not have, or lacks."""
        from .pictures import read_picture

        known = set().union(*self.ladder)
        if set(values) != known:
            raise ValueError(f"the conditions to give are {sorted(known)}, got {sorted(values)}")
        batch: dict[str, Any] = {}
        for name, value in values.items():
            if name == "text":
                batch[name] = [value]
            elif value.lstrip("-").isdigit():
                batch[name] = torch.tensor([int(value)])
            else:
                batch[name] = read_picture(value)[None]
        return batch


def with_network(model: DiffusionModel, network: nn.Module) -> DiffusionModel:
    """The same model with another network; all else is shared."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "network": network}
    return twin


def picture_sides(batch: Mapping[str, Any], side: int) -> tuple[int, int]:
    """(H, W) that a condition's picture must have: those of oblong "pixels" beside it, which are training's, or else
    `side`, the model's own."""
    height, width = batch["pixels"].shape[-2:] if "pixels" in batch else (side, side)
    return (side, side) if height == width else (height, width)


def plain_config(network: Any) -> dict[str, Any]:
    """A diffusers network's arguments, to be changed and given to its class: `from_config` would undo a change where
    the argument had been left at its default."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def check_labels(label: Tensor, num_classes: int) -> Tensor:
    """`label` (B,) itself. ValueError unless all are in [0, num_classes); labels on a GPU are not read, as that would
    make it wait."""
    if label.device.type == "cpu" and bool(((label < 0) | (label >= num_classes)).any()):
        raise ValueError(f"labels must be in [0, {num_classes}), found {label.min().item()} to {label.max().item()}")
    return label


def keep_only(model: DiffusionModel, condition: Condition, keep: Collection[str], batch: int) -> Condition:
    """The condition with all parts but `keep`, and those that are never dropped, at their null, each expanded to
    (batch, ...).

    KeyError names a part that `condition` lacks, ValueError one with another number of rows than `batch` or one.
    """
    if missing := {*keep, *(model.always if keep else ())} - condition.keys():
        raise KeyError(f"condition lacks {sorted(missing)}; it has {sorted(condition)}")
    parts = {**model.null(condition), **{name: condition[name] for name in keep}}
    for name, part in parts.items():
        if len(part) not in (1, batch):
            raise ValueError(f"condition part {name!r} must have {batch} rows, one per sample, got {len(part)}")
    return {name: part if len(part) == batch else part.expand(batch, *part.shape[1:]) for name, part in parts.items()}
