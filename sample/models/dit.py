"""DiT (Peebles & Xie 2022, arXiv 2212.09748), in pixels or in an autoencoder's latents, with class rows."""

import json
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from ..checkpoint import choose_weights, read_checkpoint, read_folder
from ..hub import locate
from ..latents import latent_space, read_autoencoder, to_pixels, to_posterior
from ..model import Condition, DiffusionModel, check_labels, plain_config
from ..noise import DiscretePath
from .dit_diffusers import network_from_diffusers, network_to_diffusers
from .dit_network import HEADS, DiTNetwork, network_from_state, sizes_of

PIXELS = "pixels in [-1, 1]"
LICENCE = "CC-BY-NC-4.0"
"""Of the authors' weights."""


class DiT(DiffusionModel):
    """Pixels in [-1, 1], or the scaled latents of a frozen `vae`; linear path, epsilon.

    Condition part "label" (B,) in [0, num_classes), null num_classes, the last class row; without classes there is no
    condition. With `learn_sigma` the second half of the output channels is the learned range of the variance.
    """

    network_name = "transformer"
    added = ("y_embedder",)
    published_as = ("DiTPipeline", "DiTTransformer2DModel", "DiTNetwork")

    def __init__(self, network: nn.Module, vae: AutoencoderKL | None = None, space: str | None = None):
        """`space` names the latents of a network that comes without its autoencoder, as a prior may. ValueError where
        it does not fit `vae`, or where four channels, say, come with neither."""
        super().__init__()
        config: Any = network.config
        channels, size = config["in_channels"], config["input_size"]
        if vae is not None:
            if space not in (None, latent_space(vae)):
                raise ValueError(f"the network was trained on {space}, the autoencoder given makes {latent_space(vae)}")
            if (made := vae.config["latent_channels"]) != channels:
                raise ValueError(f"the network takes {channels} channels, the autoencoder makes {made}")
            space = latent_space(vae)
            vae.requires_grad_(False).eval()
        elif space is None and channels not in (1, 3):
            raise ValueError(f"{channels} channels are no pixels: give the autoencoder as vae, or name its space")
        self.network, self.vae = network, vae
        self.path = DiscretePath.linear()
        self.prediction = "epsilon"
        self.num_classes: int = config["num_classes"]
        self.ladder = (frozenset({"label"} if self.num_classes else ()),)
        self.shape = (channels, size, size)
        self.space = space or PIXELS
        self.learned_range = config["learn_sigma"]

    @classmethod
    def create(
        cls,
        input_size: int = 32,
        num_classes: int = 0,
        channels: int = 3,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        learn_sigma: bool = False,
        vae: AutoencoderKL | str | None = None,
    ) -> "DiT":
        """Fresh weights as the paper has them, for x_0 of `input_size` a side: pixels, or latents of `vae` (or of the
        autoencoder in that folder)."""
        network = DiTNetwork(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )
        network.initialise()
        return cls(network, read_autoencoder(vae) if isinstance(vae, str) else vae)

    @classmethod
    def from_base(cls, base: DiffusionModel, num_classes: int = 0, row_std: float | None = None) -> "DiT":
        """A model to fine-tune on a new label set from `base`, which is left as it is; they share the autoencoder.

        The null row is the base's, so that the first unconditional prediction is the base's own. New class rows are the
        null row plus normals as wide as the base's class rows, or of `row_std`, 1 where it has none: copies would learn
        slowly. ValueError where the base is no DiT.
        """
        if not isinstance(base, DiT):
            raise ValueError(f"DiT starts from a DiT, got {type(base).__name__}")
        with torch.device("meta"):
            network = DiTNetwork(**{**plain_config(base.network), "num_classes": num_classes})
        state = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
        rows = state["y_embedder.embedding_table.weight"]
        if row_std is None:
            row_std = rows[:-1].std(0).mean().item() if len(rows) > 2 else 1.0
        spread = row_std * torch.randn(num_classes, rows.shape[1])
        state["y_embedder.embedding_table.weight"] = torch.cat([rows[-1:] + spread.to(rows), rows[-1:]])
        network.load_state_dict(state, assign=True)
        model = cls(network, base.vae, base.space)
        model.licence = base.licence
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        weights: Literal["ema", "model"] = "ema",
        num_heads: int | None = None,
        vae: AutoencoderKL | str | None = None,
        space: str | None = None,
        prior_only: bool = False,
    ) -> "DiT":
        """The model from a pipeline's folder (transformer/ and vae/), a network's, an original file, or any of them on
        the Hub ("facebook/DiT-XL-2-256").

        weights: which set, in a file that holds {model, ema, ...}. num_heads: needed for files of other widths than the
        paper's, see HEADS. vae: the autoencoder, or its folder or Hub id, as original files come without it
        ("stabilityai/sd-vae-ft-ema"). prior_only: keeps the network alone, in the space that the autoencoder names.
        Nothing tells SiT's files from DiT's: those networks predict a velocity. FileNotFoundError; ValueError says what
        does not fit.
        """
        name = pretrained_model_name_or_path
        path = locate(name, revision=revision)
        if path.is_dir() and not any(path.rglob("*.safetensors")):
            # The authors' own upload is of torch's files alone; they are read with weights only.
            path = locate(name, revision=revision, allow_patterns=["*.json", "*.bin"])
        if vae is None and (path / "vae").is_dir():
            vae = str(path / "vae")
        vae = read_autoencoder(locate(vae)) if isinstance(vae, str) else vae
        if path.is_dir():
            folder = path / cls.network_name
            network = cls.load_network(str(folder if folder.is_dir() else path))
        else:
            network = network_from_state(choose_weights(read_checkpoint(path), weights, path), path, num_heads)
        model = cls(network, vae, space)
        model = cls(network, space=model.space) if prior_only else model
        model.licence = LICENCE
        return model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        if (sizes := sizes_of(shapes)) is None:
            return None
        width, classes = sizes["hidden_size"], sizes["num_classes"]
        channels = (2 if sizes["learn_sigma"] else 1) * sizes["in_channels"]
        known = "" if width in HEADS else ", num_heads to be given"
        return f"DiT of width {width}, {sizes['depth']} layers, {classes} classes, {channels} output channels{known}"

    @classmethod
    def load_network(cls, folder: str) -> nn.Module:
        """The network from its folder: a DiTNetwork's, or a diffusers DiTTransformer2DModel's, which is converted (it
        was a Transformer2DModel once).

        FileNotFoundError; ValueError where the folder is another network's, or damaged.
        """
        if not (config := File(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is no network's folder: it has no config.json")
        held = json.loads(config.read_text())
        name = held.get("_class_name")
        if name == "DiTNetwork":
            return read_folder(DiTNetwork, folder)
        old = name == "Transformer2DModel" and held.get("norm_type") == "ada_norm_zero"
        if old or name == "DiTTransformer2DModel":
            return network_from_diffusers(read_folder(DiTTransformer2DModel, folder), folder)
        raise ValueError(f"{config} must name DiTNetwork or DiTTransformer2DModel, got {name!r}")

    @classmethod
    def tiny(cls) -> "DiT":
        """Without the zeros at the start, so that the output and every input matter."""
        network = DiTNetwork(input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
        network.initialise(zero_std=0.2)
        return cls(network)

    def config(self) -> dict[str, Any]:
        return {"space": self.space}

    def posterior(self, pixels: Tensor) -> Tensor:
        posterior = pixels * 2 - 1 if self._in_pixels() else to_posterior(self.vae, pixels)
        made = (self.shape[0], *posterior.shape[2:]) if self.vae else tuple(posterior.shape[1:])
        if made != self.shape:
            raise ValueError(f"the pictures make x_0 of shape {made}, the network takes {self.shape}")
        return posterior

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        return {name: check_labels(batch[name], self.num_classes) for name in self.ladder[0]}

    def null(self, condition: Condition) -> Condition:
        if not self.num_classes:
            return {}
        device = next(self.network.parameters()).device
        label = condition.get("label", torch.zeros(1, dtype=torch.long, device=device))
        return {"label": torch.full_like(label, self.num_classes)}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoise_with_variance(x_t, t, condition)[0]

    def denoise_with_variance(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        label = condition["label"] if self.num_classes else torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
        out = self.network(x_t, t, label)
        return out[:, : self.shape[0]], out[:, self.shape[0] :] if self.learned_range else None

    def stock_network(self, times: Tensor) -> nn.Module:
        network: Any = self.network
        return network_to_diffusers(network, times)

    def decode(self, x_0: Tensor) -> Tensor:
        return (x_0 / 2 + 0.5).clamp(0, 1) if self._in_pixels() else to_pixels(self.vae, x_0)

    def _in_pixels(self) -> bool:
        if self.vae is None and self.space != PIXELS:
            raise ValueError(
                f"this DiT came without its autoencoder ({self.space}): give it as vae to encode or decode"
            )
        return self.vae is None
