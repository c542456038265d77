"""PixArt-alpha (Chen et al. 2023, arXiv 2310.00426), 256 and multi-scale: text to image, and a prior for its kin."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn

from ..hub import locate
from ..latents import read_autoencoder, to_pixels, to_posterior
from ..model import Condition, DiffusionModel
from ..noise import DiscretePath
from ..published import space_of
from .pixart_network import network_from_file, network_from_folder, read_null

TOKENS = 120
"""The published networks' tokens per caption."""
PIXELS_PER_LATENT = 8
"""By which the autoencoder shrinks a side; the multi-scale networks are told the picture's own size."""
WITHOUT_T5 = (
    "*.json",
    "diffusion_pytorch_model*.safetensors",
    "transformer/*.safetensors",
    "vae/*.safetensors",
    "tokenizer/*",
)
"""What is fetched of a pipeline where its text encoder, by far the largest part, is not needed."""


class PixArt(DiffusionModel):
    """Scaled latents (the published: of sd-vae-ft-ema, x 0.18215); linear path, epsilon, learned range of the variance.

    Condition parts: "text" (B, N, D), T5's encodings of captions (published: N = 120, D = 4096), and "mask" (B, N),
    1 where a token is valid, 0 in the padding. Null: the learned `null_text` (1, N, D), all of its tokens valid. (The
    authors' sampling script keeps the caption's mask with it.) Latents of any size that `patch_size` divides; the
    multi-scale networks are told it, as resolution and aspect ratio.
    """

    network_name = "transformer"
    published_as = ("PixArtAlphaPipeline", "PixArtTransformer2DModel")
    null_text: Tensor

    def __init__(
        self, network: nn.Module, null_text: Tensor, vae: AutoencoderKL | None = None, space: str | None = None
    ):
        """`space` names the latents of a network that comes without its autoencoder, as a prior may. ValueError where
        it does not fit `vae`, or where `null_text` does not fit the network."""
        super().__init__()
        config: Any = network.config
        channels, width = config["in_channels"], config["caption_channels"]
        if null_text.ndim != 3 or len(null_text) != 1 or null_text.shape[2] != width:
            raise ValueError(f"null_text must have shape (1, N, {width}), got {tuple(null_text.shape)}")
        if vae is not None:
            if (made := vae.config["latent_channels"]) != channels:
                raise ValueError(f"the network takes {channels} channels, the autoencoder makes {made}")
            vae.requires_grad_(False).eval()
        self.network, self.vae = network, vae
        self.register_buffer("null_text", null_text)
        self.path = DiscretePath.linear()
        self.prediction = "epsilon"
        self.ladder = (frozenset({"text", "mask"}),)
        self.shape = (channels, config["sample_size"], config["sample_size"])
        self.space = space_of(vae, space)
        self.learned_range = config["out_channels"] == 2 * channels

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | File,
        *,
        revision: str | None = None,
        weights: Literal["ema", "model"] | None = None,
        vae: AutoencoderKL | str | File | None = None,
        space: str | None = None,
        null_text: Tensor | str | File | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        num_heads: int | None = None,
        prior_only: bool = False,
    ) -> "PixArt":
        """The model from a network's folder, a pipeline's, an original file or its shards, or any of these on the Hub.

        weights: which set of an original file; by default the averaged, where it has them. vae: the autoencoder, or its
        folder or Hub id. null_text: diffusers' folders lack the learned null: (1, N, D) or (N, D), or a file that holds
        it (an original one will do); else the caption "" stands in, encoded by `text_encoder` and `tokenizer` (T5's) or
        by those in the pipeline's folder, which are dropped again, and a warning says so. num_heads: needed for
        original files of other widths than the published. prior_only: keeps the network and its null alone.
        FileNotFoundError; ValueError says what does not fit.
        """
        known = null_text is not None or text_encoder is not None
        path = locate(pretrained_model_name_or_path, revision=revision, allow_patterns=WITHOUT_T5 if known else None)
        if vae is None and (path / "vae").is_dir():
            vae = path / "vae"
        if vae is not None and not isinstance(vae, AutoencoderKL):
            vae = read_autoencoder(locate(vae))
        space = space_of(vae, space)
        own_null = None if null_text is None else read_null(null_text)
        folder = path / cls.network_name
        if folder.is_dir() or (path / "config.json").is_file():
            null = _empty_caption(path, text_encoder, tokenizer) if own_null is None else own_null
            network = network_from_folder(folder if folder.is_dir() else path)
        else:
            network, null = network_from_file(path, weights, num_heads)
            null = null if own_null is None else own_null
        model = cls(network, null, None if prior_only else vae, space)
        model.licence = "CreativeML OpenRAIL++-M"
        return model

    @classmethod
    def load_network(cls, folder: str) -> nn.Module:
        return network_from_folder(folder)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        nulls = [shape for name, shape in shapes.items() if name.endswith("y_embedder.y_embedding")]
        if not nulls or nulls[0][0] == 300:  # the tokens of PixArt-sigma, whose latents are another autoencoder's
            return None
        multi_scale = any(name.endswith("csize_embedder.mlp.0.weight") for name in shapes)
        return f"PixArt-alpha{', multi-scale' if multi_scale else ''}"

    @classmethod
    def tiny(cls) -> "PixArt":
        network = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            sample_size=8,
            use_additional_conditions=True,
            caption_channels=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        return cls(network, torch.randn(1, 5, 8), vae)

    def config(self) -> dict[str, Any]:
        return {"space": self.space}

    def posterior(self, pixels: Tensor) -> Tensor:
        return to_posterior(self._autoencoder(), pixels)

    def encode_condition(self, batch: Mapping[str, Any]) -> Condition:
        """The parts as `encode_captions` makes them. ValueError for captions as strings, or for other shapes."""
        text, mask = batch["text"], batch["mask"]
        if not isinstance(text, Tensor):
            raise ValueError("PixArt holds no T5: give text and mask encoded, as encode_captions makes them")
        if text.shape[1:] != self.null_text.shape[1:] or mask.shape != text.shape[:2]:
            tokens, width = self.null_text.shape[1:]
            raise ValueError(
                f"text must have shape (B, {tokens}, {width}) and mask (B, {tokens}), "
                f"got {tuple(text.shape)} and {tuple(mask.shape)}"
            )
        return {"text": text, "mask": mask.float()}

    def null(self, condition: Condition) -> Condition:
        text, mask = condition.get("text", self.null_text), condition.get("mask", self.null_text[..., 0])
        return {"text": self.null_text.to(text).expand_as(text), "mask": torch.ones_like(mask)}

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoise_with_variance(x_t, t, condition)[0]

    def denoise_with_variance(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        config: Any = self.network.config
        if x_t.shape[1] != self.shape[0] or any(side % config["patch_size"] for side in x_t.shape[2:]):
            raise ValueError(
                f"x_t must have {self.shape[0]} channels and sides that are multiples of {config['patch_size']}, "
                f"got {tuple(x_t.shape)}"
            )
        size = torch.tensor([x_t.shape[2:]], dtype=torch.float32, device=x_t.device).expand(len(x_t), 2)
        out = self.network(
            x_t,
            condition["text"].to(x_t.dtype),
            t,
            {"resolution": PIXELS_PER_LATENT * size, "aspect_ratio": size[:, :1] / size[:, 1:]},  # height, width
            encoder_attention_mask=condition["mask"] > 0.5,
            return_dict=False,
        )[0]
        return out[:, : self.shape[0]], out[:, self.shape[0] :] if self.learned_range else None

    def decode(self, x_0: Tensor) -> Tensor:
        return to_pixels(self._autoencoder(), x_0)

    def _autoencoder(self) -> AutoencoderKL:
        if self.vae is None:
            raise ValueError(f"this PixArt came without its autoencoder ({self.space}): give it as vae")
        return self.vae


@torch.no_grad()
def encode_captions(
    captions: Sequence[str], text_encoder: nn.Module, tokenizer: Any, tokens: int = TOKENS
) -> Condition:
    """The condition of captions: "text" (B, tokens, D) float32 by T5's encoder (published: v1.1-XXL's), and "mask"."""
    ids = tokenizer(list(captions), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    ids = ids.to(next(text_encoder.parameters()).device)
    text = text_encoder(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    return {"text": text.float(), "mask": ids.attention_mask.float()}


def _empty_caption(path: File, text_encoder: Any, tokenizer: Any) -> Tensor:
    """The caption "" as a null text (1, TOKENS, D): its own token (T5's has one) in the padding's places too, so that
    all of them being valid is the same to an attention as the padding being masked."""
    from transformers import AutoTokenizer, T5EncoderModel

    lacks = f"{path} lacks PixArt's learned null, as diffusers' folders do"
    hint = "give null_text (an original checkpoint holds it)"
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
        if text_encoder is None:
            read: Any = T5EncoderModel.from_pretrained(
                path / "text_encoder", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            text_encoder, about = read
            if about["missing_keys"]:
                raise ValueError(f"{path / 'text_encoder'} lacks weights, {min(about['missing_keys'])} for one")
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{lacks}, and no T5 to encode an empty caption could be read there: {hint}") from error
    empty = encode_captions([""], text_encoder, tokenizer)
    warnings.warn(
        f'{lacks}: the caption "", encoded by T5, stands in for it; {hint} to have the authors\'', stacklevel=3
    )
    own = empty["text"][:, empty["mask"][0] == 1]
    return own[:, torch.arange(TOKENS) % own.shape[1]]
