"""Networks that metrics see through: any vision model of transformers, and CLIP with its text tower.

Pixels are resized and normalised as the model's own preprocessor does, in torch, on the model's device. Fréchet's own
network is in `inception`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hub import locate
from .published import read_encoder, read_tokenizer


class FeatureNetwork(Protocol):
    """The network that a metric sees through; an nn.Module must be in eval mode.

    Where it can be called on the same pixels it gives class logits (B, K): see `classifies`.
    """

    def features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of pixels (B, C, H, W) in [0, 1]."""


def classifies(network: Any) -> bool:
    """Whether calling the network gives class logits: it has a `forward`, and no `num_classes` of 0."""
    callable_ = type(network).forward is not nn.Module.forward if isinstance(network, nn.Module) else callable(network)
    return callable_ and getattr(network, "num_classes", None) != 0


def as_frames(pixels: Tensor) -> Tensor:
    """The frames (N F, C, H, W) of clips (N, C, F, H, W), a clip's together; pictures (N, C, H, W) as they are."""
    return pixels.transpose(1, 2).flatten(0, 1) if pixels.ndim == 5 else pixels


@torch.no_grad()
def frame_features(network: FeatureNetwork, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, F, D), float32 on the CPU, of each frame of clips (N, C, F, H, W) in [0, 1]; F is 1 for pictures.

    ValueError where the network is in train mode.
    """
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("the metric network must be in eval mode; call its eval()")
    found = in_batches(network.features, network, batch_size, as_frames(pixels)).float()
    return found.unflatten(0, (len(pixels), -1))


def features_of(network: FeatureNetwork, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D), float32 on the CPU, of pixels (N, C, H, W) in [0, 1], taken to the network's device.

    Of clips (N, C, F, H, W) the mean over the frames. ValueError where the network is in train mode.
    """
    return frame_features(network, pixels, batch_size).mean(1)


@torch.no_grad()
def in_batches(function: Any, network: Any, size: int, *parts: Tensor) -> Tensor:
    """The function of parts (N, ...), `size` rows at a time on the network's device: (N, ...) on the CPU."""
    parameter = next(network.parameters(), parts[0]) if isinstance(network, nn.Module) else parts[0]
    batches = zip(*(part.split(size) for part in parts), strict=True)
    return torch.cat([function(*(part.to(parameter.device) for part in batch)).cpu() for batch in batches])


@dataclass(frozen=True)
class Preprocessor:
    """How a vision model takes its pictures.

    short: the length that the shorter side is resized to, before the middle `size` is cut out; or None: the picture is
    resized to `size` (height, width) as it is. mean, std: by channel. mode: of the interpolation, antialiased.
    """

    size: tuple[int, int]
    short: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"

    @classmethod
    def read(cls, folder: File) -> "Preprocessor":
        """Of a model's folder, by its preprocessor_config.json. FileNotFoundError; ValueError for what it cannot do."""
        file = folder / "preprocessor_config.json"
        if file.is_file():
            about = json.loads(file.read_text())
        elif (both := folder / "processor_config.json").is_file():
            about = json.loads(both.read_text()).get("image_processor", {})
        else:
            raise FileNotFoundError(f"{folder} has no preprocessor_config.json, which says how to take pictures")
        size, crop = about.get("size"), about.get("crop_size") if about.get("do_center_crop", True) else None
        size = size if isinstance(size, dict) else {"shortest_edge" if crop else "height": size, "width": size}
        crop = crop if isinstance(crop, dict) or crop is None else {"height": crop, "width": crop}
        end, short = crop or size, size.get("shortest_edge")
        mode = {2: "bilinear", 3: "bicubic"}.get(about.get("resample", 3))
        if not (end.get("height") and end.get("width")) or (crop and not short) or mode is None:
            raise ValueError(
                f"{file.name} of {folder} must resize to a height and width, or the shortest edge before a crop, by "
                f"resample 2 or 3, got size {about.get('size')}, crop_size {about.get('crop_size')}, resample "
                f"{about.get('resample')}"
            )
        plain = not about.get("do_normalize", True)
        mean, std = ([0.0], [1.0]) if plain else (about["image_mean"], about["image_std"])
        return cls((end["height"], end["width"]), short if crop else None, tuple(mean), tuple(std), mode)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 1 or 3, H, W) in [0, 1] as (B, 3, *size); grey is repeated. ValueError for other channels."""
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"pixels must have shape (B, 1 or 3, H, W), got {tuple(pixels.shape)}")
        pixels = pixels.expand(-1, 3, -1, -1).float()
        size = self.size
        if self.short:
            height, width = pixels.shape[2:]
            shorter = min(height, width)
            size = (height * self.short // shorter, width * self.short // shorter)
        resized = F.interpolate(pixels, size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.short:
            top, left = ((have - want) // 2 for have, want in zip(size, self.size, strict=True))
            if min(top, left) < 0:
                raise ValueError(f"the preprocessor cuts {self.size} out of {size}: a crop larger than the picture")
            resized = resized[:, :, top : top + self.size[0], left : left + self.size[1]]
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (resized - mean) / std


class TransformersVision(nn.Module):
    """Features of a vision model of transformers: DINOv2, CLIP, SigLIP, ViT, ResNet and their like.

    features: the image embedding where the model has one (CLIP), else the pooled output, else the first token. Logits,
    by calling it, where `from_pretrained` was told `classes`.
    """

    def __init__(self, model: nn.Module, preprocessor: Preprocessor, num_classes: int = 0, pooled: bool = True):
        super().__init__()
        self.model, self.preprocessor = model, preprocessor
        self.num_classes, self.pooled = num_classes, pooled
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str, *, classes: bool = False, revision: str | None = None) -> "TransformersVision":
        """From a folder, or the Hub ("facebook/dinov2-base"), in float32.

        classes: load the classifier too, whose classes must be the labels' own. FileNotFoundError; ValueError where
        weights are missing.
        """
        from transformers import AutoModel, AutoModelForImageClassification

        folder = _folder(name, revision)
        preprocessor = Preprocessor.read(folder)
        if classes:
            model: Any = read_encoder(AutoModelForImageClassification, folder)
            return cls(model, preprocessor, model.config.num_labels)
        try:
            return cls(read_encoder(AutoModel, folder), preprocessor)
        except ValueError as error:
            if "pooler." not in str(error):
                raise
        # Classifiers of the ViT family are published without their pooler.
        return cls(read_encoder(_Unpooled, folder), preprocessor, pooled=False)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, D) from pixels (B, 1 or 3, H, W) in [0, 1]."""
        model: Any = self.model
        pixels = self.preprocessor(pixels).to(next(self.parameters()))
        if self.num_classes:
            model = model.base_model
        if hasattr(model, "get_image_features"):
            return _tensor(model.get_image_features(pixel_values=pixels))
        found = model(pixel_values=pixels)
        pooled = getattr(found, "pooler_output", None) if self.pooled else None
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K). ValueError without classes."""
        if not self.num_classes:
            raise ValueError("this network was loaded without its classes; load it with classes=True")
        return self.model(pixel_values=self.preprocessor(pixels).to(next(self.parameters()))).logits


class _Unpooled:
    """transformers' AutoModel without a pooler on top."""

    @staticmethod
    def from_pretrained(folder: File, **options: Any) -> Any:
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)


class Clip(nn.Module):
    """CLIP's two towers, which put pictures and texts into one space (arXiv 2103.00020)."""

    num_classes = 0

    def __init__(self, model: nn.Module, tokenizer: Any, preprocessor: Preprocessor):
        super().__init__()
        self.model, self.tokenizer, self.preprocessor = model, tokenizer, preprocessor
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None) -> "Clip":
        """From a folder of transformers, or the Hub ("openai/clip-vit-large-patch14"). FileNotFoundError."""
        from transformers import CLIPModel

        folder = _folder(name, revision)
        return cls(read_encoder(CLIPModel, folder), read_tokenizer(folder), Preprocessor.read(folder))

    def features(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1 of pixels (B, 1 or 3, H, W) in [0, 1]."""
        pixels = self.preprocessor(pixels).to(next(self.parameters()))
        return F.normalize(_tensor(self.model.get_image_features(pixel_values=pixels)), dim=1)  # type: ignore[operator]

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings (B, D) of length 1, float32 on the CPU; texts are cut at the tower's length, 77 tokens."""
        found = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            tokens = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(next(self.parameters()).device)
            embedded = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)  # type: ignore[operator]
            found.append(F.normalize(_tensor(embedded).float(), dim=1).cpu())
        return torch.cat(found)


def _tensor(found: Any) -> Tensor:
    """The embedding itself, which transformers 5 wraps."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _folder(name: str | File, revision: str | None) -> File:
    folder = locate(name, revision=revision)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        # Some uploads are of torch's files alone; they are read with weights only.
        folder = locate(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.bin"])
    return folder
