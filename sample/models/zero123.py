"""Zero-1-to-3 (Liu et al. 2023, arXiv 2303.11328): an object seen from elsewhere, by one picture and a move."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ..clip_image import PROJECTION, embed_pictures, image_encoder_from, read_image_parts, recognise, tiny_image_parts
from ..latents import to_latents, to_pixels, to_posterior
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath
from ..pictures import cover, read_picture
from ..published import factor, fits, latent_side, needed, space_of
from .image_variations import ImageVariations
from .stable_diffusion import StableDiffusion

MOVES = ("polar", "azimuth", "radius")


class Zero123(DiffusionModel):
    """Scaled latents of a frozen `vae`; scaled_linear path; epsilon.

    Condition parts: "image" (B, 4, h, w), the mode of the input view's latents, NOT scaled, concatenated to x_t, null
    zeros; "clip" (B, D), the input view's CLIP image embedding (ViT-L/14, D = 768), not normalised, null zeros; "pose"
    (B, 4), the camera's move as `camera_move` has it, never dropped. One rung keeps image and clip.

    The context is one token, a trained projection of [clip ; pose] (the authors' cc_projection). It is the network's
    own `encoder_hid_proj`, as diffusers calls a U-Net's projection of its contexts. The null is that of training; see
    `without_context` for that of the authors' sampler.
    """

    added = ("conv_in", "encoder_hid_proj")
    published_as = ("Zero1to3StableDiffusionPipeline", "Zero123Pipeline")
    always = frozenset({"pose"})

    def __init__(
        self,
        network: nn.Module,
        vae: AutoencoderKL | None = None,
        image_encoder: nn.Module | None = None,
        sample_size: int = 32,
        space: str | None = None,
    ):
        """sample_size: the latents' side. space: names the latents where there is no autoencoder, as for a prior."""
        super().__init__()
        fits(network, 8, "Zero-1-to-3")
        config: Any = network.config
        if config.encoder_hid_dim_type != "text_proj":
            raise ValueError("this U-Net has no projection of embedding and pose: make one with `with_projection`")
        self.network, self.vae, self.image_encoder = network, vae, image_encoder
        self.path = DiscretePath.scaled_linear()
        self.prediction = "epsilon"
        self.ladder = (frozenset({"image", "clip"}),)
        self.shape = (4, sample_size, sample_size)
        self.space = space_of(vae, space)

    @classmethod
    def from_base(
        cls, base: DiffusionModel, image_encoder: nn.Module | str | None = None, resolution: int = 256
    ) -> "Zero123":
        """A model to fine-tune from SD image variations, which is left as it is; they share all but the network.

        The four new input channels start at zero, and the projection as the identity of the embedding, with zeros for
        the pose (the authors leave its four columns at random): every first prediction is the base's with the same
        embedding. From Stable Diffusion 1.x, whose contexts are texts, it is not; then `image_encoder` is needed, CLIP
        ViT-L/14's or its folder or Hub id. ValueError for any other base, or one that came without its encoders.
        """
        if not isinstance(base, ImageVariations | StableDiffusion):
            raise ValueError(f"Zero-1-to-3 starts from ImageVariations or StableDiffusion, got {type(base).__name__}")
        if isinstance(base, ImageVariations):
            image_encoder = base.image_encoder
        elif isinstance(image_encoder, str):
            image_encoder = image_encoder_from(image_encoder)
        if base.vae is None or not isinstance(image_encoder, nn.Module):
            raise ValueError("the base came without its encoders: load it without prior_only, and give image_encoder")
        network, about = copy.deepcopy(base.network), image_encoder.config
        assert isinstance(network, UNet2DConditionModel)
        width, embedding = network.config["cross_attention_dim"], about.projection_dim  # type: ignore[union-attr]
        if width != embedding or base.prediction != "epsilon":
            raise ValueError(
                f"the base must predict epsilon from contexts as wide as the CLIP embedding ({embedding}), it predicts "
                f"{base.prediction} from contexts of {width}"
            )
        side = latent_side(network, base.vae, resolution)
        model = cls(
            with_projection(network, torch.eye(width, width + 4), torch.zeros(width)), base.vae, image_encoder, side
        )
        model.licence = base.licence
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        resolution: int = 256,
        weights: Literal["ema", "model"] | None = None,
        prior_only: bool = False,
        num_heads: int | None = None,
        image_heads: int | None = None,
    ) -> "Zero123":
        """The model from a pipeline's folder, an original file, or either on the Hub; the other arguments are those of
        `clip_image.read_image_parts`. FileNotFoundError; ValueError says what does not fit."""
        name = pretrained_model_name_or_path
        options: dict[str, Any] = {"num_heads": num_heads, "image_heads": image_heads}
        parts = read_image_parts(name, revision=revision, weights=weights, **options)
        network = parts.network
        fits(network, 8, "Zero-1-to-3")
        if parts.projection is None:
            raise ValueError(
                f"{name} has no projection of embedding and pose ({PROJECTION}* in a file; cc_projection/ or "
                "clip_camera_projection/ in a folder): it is no Zero-1-to-3"
            )
        network = with_projection(network, parts.projection["weight"], parts.projection["bias"])
        side = latent_side(network, parts.vae, resolution)
        model = cls(network, parts.vae, parts.image_encoder, side)
        return cls(network, sample_size=side, space=model.space) if prior_only else model

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        kind = recognise(shapes, in_channels=8)
        return f"Zero-1-to-3, {kind}" if kind and f"{PROJECTION}weight" in shapes else None

    @classmethod
    def tiny(cls) -> "Zero123":
        parts = tiny_image_parts(in_channels=8)
        projection = nn.Linear(16 + 4, 16)
        network = with_projection(parts.network, projection.weight.detach(), projection.bias.detach())
        return cls(network, parts.vae, parts.image_encoder, sample_size=8)

    def config(self) -> dict[str, Any]:
        return {"sample_size": self.shape[1], "space": self.space}

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(needed(self.vae), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """ "image": the input view, pixels (B, 3, R, R) in [0, 1], or its latents (B, 4, h, w); "clip": its embedding
        (B, D), needed beside latents alone; "pose": the move (B, 4)."""
        image, pose = batch["image"], batch["pose"]
        if pose.shape[1:] != (4,):
            raise ValueError(f"pose must have shape (B, 4), as camera_move makes it, got {tuple(pose.shape)}")
        if image.shape[1] == self.shape[0]:
            if "clip" not in batch:
                raise ValueError("an input view given as latents needs its CLIP embedding too, as clip (B, D)")
            return {"image": image, "clip": batch["clip"], "pose": pose.float()}
        vae, side = needed(self.vae), self._resolution()
        if image.shape[1:] != (3, side, side):
            raise ValueError(f"the input view must have shape (B, 3, {side}, {side}), got {tuple(image.shape)}")
        clip = batch["clip"] if "clip" in batch else embed_pictures(self.image_encoder, image)
        return {"image": to_latents(vae, image) / vae.config["scaling_factor"], "clip": clip, "pose": pose.float()}

    def read_condition(self, **values: str) -> dict[str, Any]:
        """image=FILE, resized and its centre cut out; and the move: polar and azimuth in degrees, radius, 0 if absent.

        "first:stop:step" stands for several values, stop left out, each a row of the batch: azimuth=0:360:30 is a
        turntable of 12. ValueError for other names or values.
        """
        if "image" not in values or set(values) - {"image", *MOVES}:
            raise ValueError(
                f"the conditions to give are image, and any of {', '.join(MOVES)}, 0 if absent, got {sorted(values)}"
            )
        swept = {name: sweep(name, values.get(name, "0")) for name in MOVES}
        rows = max(map(len, swept.values()))
        if any(len(numbers) not in (1, rows) for numbers in swept.values()):
            lengths = ", ".join(f"{name} {len(numbers)}" for name, numbers in swept.items())
            raise ValueError(f"moves that are swept together must be as many, got {lengths}")
        polar, azimuth, radius = (numbers.expand(rows) for numbers in swept.values())
        picture = cover(read_picture(values["image"])[None], self._resolution())
        pose = camera_move(polar.deg2rad(), azimuth.deg2rad(), radius)
        return {"image": picture.expand(rows, 3, -1, -1), "pose": pose}

    def null(self, condition: Condition) -> Condition:
        config: Any = self.network.config
        device = next(self.network.parameters()).device
        absent = {
            "image": torch.zeros(1, *self.shape, device=device),
            "clip": torch.zeros(1, config.encoder_hid_dim - 4, device=device),
            "pose": torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device),  # no move
        }
        given = {**absent, **condition}
        return {**{name: torch.zeros_like(given[name]) for name in ("image", "clip")}, "pose": given["pose"]}

    def without_context(self) -> "Zero123":
        """This network with its context at zero, as the authors' sampler has it for unconditional, where training kept
        the pose. No default: a prior, unconditional(model.without_context(), onto=model). Weights are shared."""
        network: Any = self.network
        width, into = network.encoder_hid_proj.weight.shape
        bare = with_projection(network, torch.zeros(width, into), torch.zeros(width))
        return Zero123(bare, sample_size=self.shape[1], space=self.space).eval()

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = torch.cat([x_t, condition["image"].to(x_t.dtype)], 1)
        context = torch.cat([condition["clip"], condition["pose"].to(condition["clip"])], 1)
        return self.network(x, t, context[:, None].to(x_t.dtype), return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(needed(self.vae), x_0)

    def _resolution(self) -> int:
        return self.shape[1] * factor(needed(self.vae))


def camera_move(polar: Tensor, azimuth: Tensor, radius: Tensor) -> Tensor:
    """The pose (B, 4) of a move by polar angle and azimuth in radians and by radius, each (B,): [polar, sin azimuth,
    cos azimuth, radius]. The polar angle is measured from the zenith: positive moves go down."""
    return torch.stack([polar, azimuth.sin(), azimuth.cos(), radius], 1)


def sweep(name: str, text: str) -> Tensor:
    """ "30" as [30.], "0:360:30" as [0., 30., ..., 330.]. ValueError for anything else."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if all(map(math.isfinite, numbers)):
        if len(numbers) == 1:
            return torch.tensor(numbers)
        if len(numbers) == 3 and (numbers[1] - numbers[0]) * numbers[2] > 0:
            return torch.arange(*numbers)
    raise ValueError(f"{name} must be a number, or first:stop:step as in 0:360:30, got {text!r}")


def with_projection(unet: UNet2DConditionModel, weight: Tensor, bias: Tensor) -> UNet2DConditionModel:
    """The U-Net with 8 input channels, those that it lacks at zero, and with that projection of its contexts (B, 1,
    weight.shape[1]). Its other tensors are shared."""
    state = unet.state_dict()
    kernel = state["conv_in.weight"]
    if lacking := 8 - kernel.shape[1]:
        state["conv_in.weight"] = torch.cat([kernel, kernel.new_zeros(len(kernel), lacking, *kernel.shape[2:])], 1)
    # diffusers' private entries say which others were left at their defaults, and would put those back
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config |= {"in_channels": 8, "encoder_hid_dim": weight.shape[1], "encoder_hid_dim_type": "text_proj"}
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    state |= {"encoder_hid_proj.weight": weight.to(kernel), "encoder_hid_proj.bias": bias.to(kernel)}
    network.load_state_dict(state, assign=True)
    return network
