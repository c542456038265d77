"""How well each picture agrees with what its condition asks for: a number per condition, (N,), by name.

Clips (N, C, F, H, W) are met frame by frame; a number is then the mean over the frames.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .feature_networks import Clip, as_frames, frame_features, in_batches

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) between pictures and targets (B, C, H, W) in [0, 1], such as `lpips.Lpips`."""
AGREEMENTS = ("psnr", "clip_text", "clip_image", "clip_direction", "ssim", "lpips")
"""The names of what `Asked.scores` gives."""
REACH = 5
"""How far SSIM's window reaches from its middle: pictures that are no larger a side have no SSIM."""


@dataclass
class Asked:
    """What N conditions ask for, and the networks that say how near a picture comes. All but what is given is left out.

    target: pixels (N, C, H, W) or (N, C, F, H, W). text: N captions of what is asked for, or instructions.
    image: the conditions' own pictures (N, 1 or 3, H, W), of any size. image_text: N captions of these. clip: CLIP's
    towers. perceptual: as `Perceptual`; a module must be in eval mode. metrics: which of AGREEMENTS are wanted.
    ValueError where their numbers differ.
    """

    target: Tensor | None = None
    text: Sequence[str] | None = None
    image: Tensor | None = None
    image_text: Sequence[str] | None = None
    clip: Clip | None = None
    perceptual: Perceptual | None = None
    metrics: Collection[str] = AGREEMENTS
    batch_size: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.text, str) or isinstance(self.image_text, str):
            raise ValueError(
                "text and image_text must be lists of captions, one of each condition, got a single string"
            )
        given = {name: len(part) for name in ("target", "text", "image", "image_text") if (part := self._get(name))}
        if len(set(given.values())) > 1:
            raise ValueError(f"what is asked for must be of the same conditions, got different numbers: {given}")
        if self.perceptual is not None and getattr(self.perceptual, "training", False):
            raise ValueError("the perceptual network must be in eval mode; call its eval()")
        self.count = next(iter(given.values()), None)

    def _get(self, name: str) -> Any:
        part = getattr(self, name)
        return None if part is None else range(len(part))

    def scores(self, pictures: Tensor, embedded: Tensor | None = None) -> dict[str, Tensor]:
        """Numbers (N,), float32 on the CPU, of pictures (N, C, H, W) or clips in [0, 1].

        With a target: "psnr" (dB), "ssim" (pictures of at least 6 a side) and, by `perceptual`, "lpips". With clip,
        cosines of CLIP's embeddings: "clip_text" to the text (CLIPScore, arXiv 2104.08718, is 2.5 times what is above
        0 of it); "clip_image" to the target, or without one to the condition's picture; "clip_direction", of the change
        from the condition's picture to the one made, with the change from image_text to text (StyleGAN-NADA, arXiv
        2108.00946; InstructPix2Pix, 2211.09800), or, where only instructions tell what to do, with the change from the
        condition's picture to the target.
        embedded: clip's features (N, F, D) of the pictures, where they are known. ValueError where N differs.
        """
        if self.count not in (None, len(pictures)):
            raise ValueError(f"the conditions are {self.count}, the pictures {len(pictures)}; they must be as many")
        found = {} if self.target is None else self._to_target(pictures, self.target)
        given = any(part is not None for part in (self.text, self.target, self.image))
        if self.clip is not None and given and any(name.startswith("clip_") for name in self.metrics):
            found |= self._in_clip(self._embed(pictures) if embedded is None else embedded)
        found = {name: values for name, values in found.items() if name in self.metrics}
        return {name: values.float() for name, values in found.items()}

    def _to_target(self, pictures: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = {"psnr": psnr(pictures, target).cpu()}
        if "ssim" in self.metrics and min(pictures.shape[-2:]) > REACH:
            found["ssim"] = ssim(pictures, target).cpu()
        if self.perceptual is not None and "lpips" in self.metrics:
            frames = as_frames(pictures), as_frames(target)
            distances = in_batches(self.perceptual, self.perceptual, self.batch_size, *frames)
            if distances.shape != (len(frames[0]),):
                wanted = f"({len(frames[0])},)"
                raise ValueError(f"perceptual must give a distance of each picture, {wanted}, got {distances.shape}")
            found["lpips"] = distances.view(len(pictures), -1).mean(1)
        return found

    def _in_clip(self, made: Tensor) -> dict[str, Tensor]:
        """Of the embeddings (N, F, D); all are of length 1, so that a product is a cosine."""
        text, image, target, image_text = self._text, self._image, self._target, self._image_text
        found = {}
        if text is not None:
            found["clip_text"] = made @ text[:, :, None]
        if (like := image if target is None else target) is not None:
            found["clip_image"] = (made * like).sum(-1)
        if image is not None:
            asked = None if target is None else target - image
            if text is not None and image_text is not None:
                asked = (text - image_text)[:, None]
            if asked is not None:
                found["clip_direction"] = F.cosine_similarity(made - image, asked, dim=-1)
        return {name: values.flatten(1).mean(1) for name, values in found.items()}

    def _embed(self, pixels: Tensor) -> Tensor:
        assert self.clip is not None
        return frame_features(self.clip, pixels, self.batch_size)

    # Embedded once, however many candidates are scored.

    @cached_property
    def _text(self) -> Tensor | None:
        return None if self.clip is None or self.text is None else self.clip.texts(self.text, self.batch_size)

    @cached_property
    def _image_text(self) -> Tensor | None:
        return (
            None if self.clip is None or self.image_text is None else self.clip.texts(self.image_text, self.batch_size)
        )

    @cached_property
    def _image(self) -> Tensor | None:
        return None if self.image is None else self._embed(self.image)

    @cached_property
    def _target(self) -> Tensor | None:
        return None if self.target is None else self._embed(self.target)


def as_texts(part: Any) -> list[str] | None:
    """A batch's captions, where that part of it is captions, not tokens or contexts."""
    words = isinstance(part, list | tuple) and all(isinstance(text, str) for text in part)
    return list(part) if words else None


def as_pictures(part: Any) -> Tensor | None:
    """A batch's pictures (N, 1 or 3, H, W), where that part of it is pictures, not latents or embeddings."""
    seen = isinstance(part, Tensor) and part.is_floating_point() and part.ndim == 4 and part.shape[1] in (1, 3)
    return part if seen else None


def _alike(pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The frames of both. ValueError where the shapes differ."""
    if pixels.shape != target.shape:
        raise ValueError(f"target must have the pictures' shape {tuple(pixels.shape)}, got {tuple(target.shape)}")
    return as_frames(pixels).float(), as_frames(target).to(pixels.device).float()


def psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pixels (N, ...) in [0, 1]; at most 100, so that equals stay finite."""
    x, y = _alike(pixels, target)
    error = (x - y).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-10).log10()).view(len(pixels), -1).mean(1)


def ssim(pixels: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (N,) of pixels (N, C, H, W) in [0, 1], the mean over places and channels; 1 for equals.

    Wang et al. 2004 (Image quality assessment, eq. 13): K = 0.01 and 0.03, a Gaussian window of 1.5, 11 a side. As in
    torchmetrics it is at every pixel, over the mirrored picture beyond the edges, where the authors' stays inside.
    ValueError for pictures of less than 6 a side.
    """
    x, y = _alike(pixels, target)
    if min(x.shape[2:]) <= REACH:
        raise ValueError(f"SSIM needs pictures of at least {REACH + 1} a side, got {tuple(pixels.shape)}")
    weights = (-(torch.arange(-REACH, REACH + 1, device=x.device) ** 2) / (2 * 1.5**2)).exp()
    weights = weights / weights.sum()
    found = []
    for a, b in zip(x.split(64), y.split(64), strict=True):
        parts = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]
        parts = F.pad(parts, [REACH] * 4, mode="reflect")
        local = F.conv2d(F.conv2d(parts, weights[None, None, :, None]), weights[None, None, None, :])
        mean_a, mean_b, aa, bb, ab = local.unflatten(0, (5, len(a), -1))
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        spread = aa + bb - mean_a**2 - mean_b**2
        found.append((luminance * (2 * (ab - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)).flatten(1).mean(1))
    return torch.cat(found).view(len(pixels), -1).mean(1)
