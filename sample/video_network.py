"""VideoCrafter's and DynamiCrafter's network: diffusers' UNet3DConditionModel, and what hangs on it.

VideoCrafter1 (Chen et al. 2023, arXiv 2310.19512), VideoCrafter2 (arXiv 2401.09047), DynamiCrafter (Xing et al. 2023,
arXiv 2310.12190).
"""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet3DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import IPAdapterPlusImageProjection, TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .checkpoint import read_folder

TOKENS = 16
"""DynamiCrafter's image tokens per frame."""


class VideoNetwork(ModelMixin, ConfigMixin):
    """The prediction (B, out_channels, F, h, w) at x_t, from a text, a rate and a picture.

    attends: the levels, outermost first, that have attention. head_channels: the width of an attention head.
    relative: the furthest distance in time that VideoCrafter1's temporal attention tells apart, 0 for none.
    temporal_conv: convolutions along time after each residual block; VideoCrafter1 has none.
    rate: the network takes a number, frames per second or a stride. image_width: of the picture's tokens, 0 where it
    takes no picture; then `projection` describes the resampler: hidden_dims, depth, heads, dim_head, ffn_ratio.
    learned_gain: each layer weighs the picture by tanh(alpha) + 1. frames: of a clip, which a resampler fixes.
    dropout: in the residual blocks, in training.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attends: tuple[bool, ...] = (True, True, True, False),
        head_channels: int = 64,
        cross_attention_dim: int = 1024,
        norm_num_groups: int = 32,
        frames: int = 16,
        relative: int = 0,
        temporal_conv: bool = True,
        rate: bool = False,
        image_width: int = 0,
        projection: Mapping[str, int] | None = None,
        learned_gain: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.unet = UNet3DConditionModel(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock3D" if yes else "DownBlock3D" for yes in attends),
            up_block_types=tuple("CrossAttnUpBlock3D" if yes else "UpBlock3D" for yes in reversed(attends)),
            attention_head_dim=head_channels,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=norm_num_groups,
        )
        unet: Any = self.unet
        if not temporal_conv:
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
                block.temp_convs = nn.ModuleList(NoConvolution() for _ in block.temp_convs)
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = dropout
        if relative:
            for name in temporal_attentions(unet):
                unet.get_submodule(name).set_processor(RelativeAttention(head_channels, relative))
        if rate:
            unet.time_embedding = TimeAndRate(block_out_channels[0], unet.time_embedding)
        if not image_width:
            return
        self.image_projection = IPAdapterPlusImageProjection(
            image_width, cross_attention_dim, num_queries=TOKENS * frames, **(projection or {})
        )
        self.image_attention = nn.ModuleList()
        for name in text_attentions(unet):
            layer = unet.get_submodule(name)
            image = ImageAttention(cross_attention_dim, layer.inner_dim, learned_gain)
            self.image_attention.append(image)
            layer.set_processor(_TextAndImage(image, frames))

    def forward(
        self, x_t: Tensor, t: Tensor, text: Tensor, rate: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """x_t (B, in_channels, F, h, w), t (B,), text (B, N, D), rate (B,), image (B, M, image_width)."""
        if image is not None:
            text = torch.cat([text, self.image_projection(image)], 1)
        features = None if rate is None else self.unet.time_proj(rate).to(x_t.dtype)
        return self.unet(x_t, t, text, timestep_cond=features, return_dict=False)[0]


class NoConvolution(nn.Module):
    """In the place of a temporal convolution."""

    def forward(self, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        return hidden_states


class TimeAndRate(nn.Module):
    """The embedding of time, and that of the rate added to it."""

    def __init__(self, features: int, time: nn.Module):
        super().__init__()
        self.time, self.rate = time, TimestepEmbedding(features, 4 * features)

    def forward(self, time: Tensor, rate: Tensor) -> Tensor:
        return self.time(time) + self.rate(rate)


class RelativeAttention(nn.Module):
    """Self-attention over frames whose keys and values also tell how far apart two frames are (Shaw et al. 2018, arXiv
    1803.02155, eqs. 3 to 5); distances beyond `furthest` count as that. A processor of diffusers' Attention."""

    def __init__(self, width: int, furthest: int):
        super().__init__()
        self.furthest = furthest
        self.keys, self.values = (nn.Parameter(torch.randn(2 * furthest + 1, width) / width**0.5) for _ in range(2))

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))  # (N H F D)
        frames = torch.arange(q.shape[2], device=q.device)
        distance = (frames - frames[:, None]).clamp(-self.furthest, self.furthest) + self.furthest  # (query, key)
        scores = q @ k.mT + torch.einsum("nhqd,qkd->nhqk", q, self.keys[distance])
        weights = (scores * attn.scale).softmax(-1)
        out = weights @ v + torch.einsum("nhqk,qkd->nhqd", weights, self.values[distance])
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class ImageAttention(nn.Module):
    """Attention to the picture's tokens in one layer: their keys and values, and how much they weigh."""

    def __init__(self, width: int, inner: int, learned_gain: bool):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.alpha = nn.Parameter(torch.zeros(())) if learned_gain else None

    def forward(self, query: Tensor, image: Tensor) -> Tensor:
        """query (N, H, L, D), image (N, TOKENS, width)."""
        gain = 1.0 if self.alpha is None else self.alpha.tanh() + 1
        return gain * _attend(query, self.to_k_ip(image), self.to_v_ip(image))


class _TextAndImage:
    """Attention to the text, and to the picture's tokens of the row's own frame: a processor of diffusers' Attention.

    The context holds the text's tokens, then those of the picture for each frame; rows are clips times frames.
    """

    def __init__(self, image: ImageAttention, frames: int):
        self.image, self.frames = image, frames

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        text, image = encoder_hidden_states.tensor_split([-TOKENS * self.frames], 1)
        rows = torch.arange(len(image), device=image.device)
        image = image.unflatten(1, (self.frames, TOKENS))[rows, rows % self.frames]
        query = _heads(attn.to_q(hidden_states), attn.heads)
        out = _attend(query, attn.to_k(text), attn.to_v(text)) + self.image(query, image)
        return attn.to_out[1](attn.to_out[0](out))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, H D) as (N, H, L, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    heads = query.shape[1]
    out = scaled_dot_product_attention(query, _heads(keys, heads), _heads(values, heads))
    return out.transpose(1, 2).flatten(2)


def text_attentions(unet: nn.Module) -> list[str]:
    """The names of the layers that attend to the text, in the order of `image_attention`."""
    return [name for name, _ in unet.named_modules() if name.endswith(".attn2") and ".attentions." in name]


def temporal_attentions(unet: nn.Module) -> list[str]:
    """The names of the layers that attend along time."""
    places = ("transformer_in.", "temp_attentions.")
    names = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    return [name for name in names if any(place in name for place in places)]


def with_picture(base: VideoNetwork, image_width: int) -> VideoNetwork:
    """A network like `base` that also takes a picture, a frame's channels beside x_t's, and a rate; its own weights.

    What is new has no effect at first: the channels, the picture's values and the rate's embedding start at zero. The
    resampler is as deep as DynamiCrafter's, and as wide as the contexts.
    """
    config = {name: value for name, value in base.config.items() if not name.startswith("_")}  # type: ignore[attr-defined]
    width, head = config["cross_attention_dim"], config["head_channels"]
    config |= {"in_channels": 2 * config["in_channels"], "rate": True, "image_width": image_width, "dropout": 0.1}
    config["projection"] = {"hidden_dims": width, "depth": 4, "heads": 12, "dim_head": head, "ffn_ratio": 4}
    network = VideoNetwork(**{**config, "learned_gain": True})
    for image in network.image_attention:
        nn.init.zeros_(image.to_v_ip.weight)  # type: ignore[arg-type, union-attr]
    state = dict(base.state_dict())
    if not base.config["rate"]:  # type: ignore[attr-defined]
        nn.init.zeros_(network.unet.time_embedding.rate.linear_2.weight)
        nn.init.zeros_(network.unet.time_embedding.rate.linear_2.bias)
        start = "unet.time_embedding."
        state = {k.replace(start, f"{start}time.") if k.startswith(start) else k: v for k, v in state.items()}
    kernel = state["unet.conv_in.weight"]
    state["unet.conv_in.weight"] = torch.cat([kernel, torch.zeros_like(kernel)], 1)
    network.load_state_dict({**network.state_dict(), **state})
    return network if kernel.dtype == torch.float32 else network.to(kernel.dtype)


def load_video_network(folder: str | File) -> VideoNetwork:
    """The network from its folder. ValueError unless it holds one."""
    config = VideoNetwork.load_config(folder)
    if config.get("_class_name") != VideoNetwork.__name__:
        raise ValueError(f"{folder}/config.json must name a VideoNetwork, got {config.get('_class_name')!r}")
    return read_folder(VideoNetwork, folder)
