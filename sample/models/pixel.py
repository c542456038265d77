"""A small pixel model on diffusers' UNet2DModel, with class rows and optional image channels."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import Condition, DiffusionModel, check_labels, picture_sides, plain_config
from ..noise import DiscretePath, Prediction


class PixelUNet(DiffusionModel):
    """Pixels in [-1, 1], folded (space to depth) so that a few channels see a whole picture; cosine path.

    Condition parts: "label" (B,) in [0, num_classes), null num_classes, the last class row; and "image"
    (B, image_channels, H, W) in [0, image_gain], concatenated to the input, null the zero picture.
    A model has either, both (one rung: both are kept or both dropped) or neither. With `image_gain` above 1 the
    channels that fine-tuning adds learn faster than what they were added to, at one learning rate.
    """

    added = ("conv_in", "class_embedding")

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 0,
        image_channels: int = 0,
        fold: int = 4,
        picture_channels: int = 1,
        prediction: Prediction = "v_prediction",
        image_gain: float = 1.0,
    ):
        super().__init__()
        self.network = network
        self.path = DiscretePath.cosine()
        self.prediction = prediction
        self.num_classes, self.image_channels = num_classes, image_channels
        self.fold, self.picture_channels, self.image_gain = fold, picture_channels, image_gain
        self.parts = tuple(name for name, here in (("label", num_classes > 0), ("image", image_channels > 0)) if here)
        self.ladder = (frozenset(self.parts),)
        config: Any = network.config
        self.shape = (picture_channels * fold**2, config.sample_size, config.sample_size)
        self.space = f"pixels in [-1, 1], folded by {fold}"
        expected = (picture_channels + image_channels) * fold**2
        if config.in_channels != expected or config.num_class_embeds != num_classes + 1:
            raise ValueError(
                f"the network must have {expected} input channels and {num_classes + 1} class rows, "
                f"got {config.in_channels} and {config.num_class_embeds}"
            )

    @classmethod
    def create(
        cls,
        resolution: int = 32,
        num_classes: int = 0,
        image_channels: int = 0,
        fold: int = 4,
        picture_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        prediction: Prediction = "v_prediction",
    ) -> "PixelUNet":
        """Random weights at `resolution` pixels a side, attention in the lowest level."""
        levels = len(block_out_channels)
        network = UNet2DModel(
            sample_size=resolution // fold,
            in_channels=(picture_channels + image_channels) * fold**2,
            out_channels=picture_channels * fold**2,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            attention_head_dim=16,
            norm_num_groups=8,
            num_class_embeds=num_classes + 1,
        )
        return cls(network, num_classes, image_channels, fold, picture_channels, prediction)

    @classmethod
    def from_base(
        cls,
        base: DiffusionModel,
        num_classes: int = 0,
        image_channels: int = 0,
        image_gain: float = 1.0,
        row_std: float = 1.0,
    ) -> "PixelUNet":
        """A model to fine-tune from an unconditional or class-conditional `base`, which is left as it is.

        New input channels start at zero and the null row is the base's, so that the first unconditional prediction is
        the base's own. New class rows are the null row plus normals of `row_std`: copies would learn slowly.
        """
        if not isinstance(base, PixelUNet):
            raise ValueError(f"PixelUNet starts from a PixelUNet, got {type(base).__name__}")
        old: Any = base.network
        widened = {
            "in_channels": (base.picture_channels + image_channels) * base.fold**2,
            "num_class_embeds": num_classes + 1,
        }
        network = UNet2DModel(**{**plain_config(old), **widened})
        state = copy.deepcopy(old.state_dict())
        kernel, rows = state["conv_in.weight"], state["class_embedding.weight"]
        new = network.state_dict()
        state["conv_in.weight"] = torch.zeros_like(new["conv_in.weight"])
        kept = base.picture_channels * base.fold**2
        state["conv_in.weight"][:, :kept] = kernel[:, :kept]
        spread = row_std * torch.randn(num_classes, rows.shape[1])
        state["class_embedding.weight"] = torch.cat([rows[-1:] + spread, rows[-1:]])
        network.load_state_dict(state)
        return cls(network, num_classes, image_channels, base.fold, base.picture_channels, base.prediction, image_gain)

    @classmethod
    def tiny(cls) -> "PixelUNet":
        return cls.create(resolution=16, num_classes=3, image_channels=1, fold=2, block_out_channels=(16, 32))

    def config(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "image_channels": self.image_channels,
            "fold": self.fold,
            "picture_channels": self.picture_channels,
            "prediction": self.prediction,
            "image_gain": self.image_gain,
        }

    @property
    def side_step(self) -> int:  # type: ignore[override]
        config: Any = self.network.config
        return self.fold * 2 ** (len(config.block_out_channels) - 1)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels * 2 - 1, self.fold)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        parts = {}
        if "label" in self.parts:
            parts["label"] = check_labels(batch["label"], self.num_classes)
        if "image" in self.parts:
            height, width = picture_sides(batch, self.shape[1] * self.fold)
            if batch["image"].shape[1:] != (self.image_channels, height, width):
                expected, found = f"(B, {self.image_channels}, {height}, {width})", tuple(batch["image"].shape)
                raise ValueError(f"the condition's image must have shape {expected}, got {found}")
            parts["image"] = self.image_gain * batch["image"]
        return parts

    def null(self, condition: Condition) -> Condition:
        parts = {}
        device = next(self.network.parameters()).device
        if "label" in self.parts:
            label = condition.get("label", torch.zeros(1, dtype=torch.long, device=device))
            parts["label"] = torch.full_like(label, self.num_classes)
        if "image" in self.parts:
            side = self.shape[1] * self.fold
            image = condition.get("image", torch.zeros(1, self.image_channels, side, side, device=device))
            parts["image"] = torch.zeros_like(image)
        return parts

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if "image" in self.parts:
            image = F.pixel_unshuffle(condition["image"].to(x_t.dtype), self.fold)
            x_t = torch.cat([x_t, image], 1)
        if "label" in self.parts:
            label = condition["label"]
        else:
            label = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
        return self.network(x_t, t, class_labels=label, return_dict=False)[0]

    def decode(self, x_0: Tensor) -> Tensor:
        return (F.pixel_shuffle(x_0, self.fold) / 2 + 0.5).clamp(0, 1)
