"""Stock diffusers pipelines of random weights, a second or less on a CPU, one for each row of the table."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from priorguide.sample.published import tiny_unet, tiny_vae
from priorguide.sample.text import tiny_text

STEPS = 3


@dataclass
class Tiny:
    """A pipeline, the arguments of a guided call but for the seed, and those that turn guidance off.

    null: (argument of the network's call, what every unconditional row has there).
    """

    pipe: Any
    options: dict[str, Any]
    off: dict[str, Any]
    null: tuple[str, Tensor]
    network: str = "transformer"

    def __call__(self, seed: int = 0, **options: Any) -> Tensor:
        """The pipeline's output."""
        given = {"num_inference_steps": STEPS, "output_type": "latent", **self.options, **options}
        if isinstance(self.pipe, diffusers.DiTPipeline):
            given["output_type"] = "pt"
        out = self.pipe(generator=torch.Generator().manual_seed(seed), return_dict=False, **given)[0]
        return out if isinstance(out, Tensor) else torch.as_tensor(out)

    @property
    def networks(self) -> list[Any]:
        names = (self.network, f"{self.network}_2")
        return [network for name in names if (network := getattr(self.pipe, name, None)) is not None]


def another(network: Any, seed: int = 7) -> Any:
    """A network of the same kind with other weights, none of them zero."""
    return shaken(copy.deepcopy(network), seed)


def shaken(network: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return network.eval()


def made(network: Any) -> Any:
    return shaken(network, 0)


def embeds(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def scheduler_of_sd() -> Any:
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return diffusers.DDIMScheduler(**betas, steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(make: Callable[..., Tiny]) -> Callable[..., Tiny]:
    """The same weights at every call."""

    @functools.wraps(make)
    def made_alike(*args: Any, **kwargs: Any) -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return made_alike


@seeded
def stable_diffusion() -> Tiny:
    text_encoder, tokenizer = tiny_text()
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=made(tiny_unet(4)),
        scheduler=scheduler_of_sd(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"height": 16, "width": 16, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative), "unet")


@seeded
def image_to_image() -> Tiny:
    text = stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**text.pipe.components, requires_safety_checker=False)
    options = {k: v for k, v in text.options.items() if k not in ("height", "width")}
    picture = Image.new("RGB", (16, 16), (200, 90, 30))
    return Tiny(quiet(pipe), {**options, "image": picture, "strength": 0.9}, text.off, text.null, "unet")


@seeded
def xl() -> Tiny:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 16,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=made(unet),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"pooled_prompt_embeds": embeds(2, 16), "negative_pooled_prompt_embeds": embeds(1, 16).expand(2, -1)}
    options |= {"height": 16, "width": 16, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative), "unet")


@seeded
def instruct_pix2pix() -> Tiny:
    text_encoder, tokenizer = tiny_text()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=made(tiny_unet(8)),
        scheduler=scheduler_of_sd(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"image": embeds(2, 3, 16, 16).clamp(-1, 1) / 2 + 0.5, "guidance_scale": 4.0}
    options |= {"image_guidance_scale": 1.5}
    off = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
    return Tiny(quiet(pipe), options, off, ("encoder_hidden_states", negative), "unet")


@seeded
def video() -> Tiny:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=12,
        addition_time_embed_dim=4,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=224
    )
    vision.projection_dim = 16
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=made(unet),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
    )
    options = {"image": Image.new("RGB", (16, 16), (200, 90, 30)), "num_frames": 2, "height": 16, "width": 16}
    options |= {"min_guidance_scale": 2.0, "max_guidance_scale": 4.0, "decode_chunk_size": 2}
    off = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    return Tiny(quiet(pipe), options, off, ("encoder_hidden_states", torch.zeros(1, 1, 16)), "unet")


@seeded
def dit() -> Tiny:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = diffusers.DiTPipeline(transformer=made(transformer), vae=tiny_vae(), scheduler=diffusers.DDIMScheduler())
    options = {"class_labels": [3, 5], "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("class_labels", torch.tensor([1000])))


@seeded
def pixart() -> Tiny:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        transformer=made(transformer),
        scheduler=diffusers.DDIMScheduler(),
    )
    negative = embeds(1, 5, 8, seed=1)
    options = {"prompt_embeds": embeds(2, 5, 8), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
    options |= {"negative_prompt": None, "height": 16, "width": 16, "use_resolution_binning": False}
    return Tiny(
        quiet(pipe), {**options, "guidance_scale": 4.0}, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative)
    )


@seeded
def sd3() -> Tiny:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=made(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"pooled_prompt_embeds": embeds(2, 16), "negative_pooled_prompt_embeds": embeds(1, 16).expand(2, -1)}
    options |= {"height": 16, "width": 16, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative))


@seeded
def sana() -> Tiny:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=made(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    negative = embeds(1, 5, 8, seed=1)
    options = {"prompt_embeds": embeds(2, 5, 8), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
    options |= {"negative_prompt": None, "height": 256, "width": 256, "use_resolution_binning": False}
    return Tiny(
        quiet(pipe), {**options, "guidance_scale": 4.0}, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative)
    )


@seeded
def cogvideox() -> Tiny:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=made(transformer),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative))


@seeded
def ltx() -> Tiny:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=made(transformer),
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"prompt_attention_mask": torch.ones(2, 8), "negative_prompt_attention_mask": torch.ones(2, 8)}
    options |= {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative))


@seeded
def wan(two: bool = False) -> Tiny:
    def transformer(seed: int) -> Any:
        network = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )
        return shaken(network, seed)

    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer(0),
        transformer_2=transformer(1) if two else None,
        boundary_ratio=0.8 if two else None,
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0}
    return Tiny(quiet(pipe), options, {"guidance_scale": 1.0}, ("encoder_hidden_states", negative))


@seeded
def flux() -> Tiny:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=made(transformer),
    )
    negative = embeds(1, 8, 16, seed=1)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"pooled_prompt_embeds": embeds(2, 16), "negative_pooled_prompt_embeds": embeds(1, 16).expand(2, -1)}
    options |= {"height": 32, "width": 32, "true_cfg_scale": 4.0}
    return Tiny(quiet(pipe), options, {"true_cfg_scale": 1.0}, ("encoder_hidden_states", negative))


@seeded
def qwen_image() -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=made(transformer),
    )
    negative = embeds(1, 8, 16, seed=1)
    ones = torch.ones(2, 8, dtype=torch.long)
    options = {"prompt_embeds": embeds(2, 8, 16), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    options |= {"prompt_embeds_mask": ones, "negative_prompt_embeds_mask": ones}
    options |= {"height": 32, "width": 32, "true_cfg_scale": 4.0}
    return Tiny(quiet(pipe), options, {"true_cfg_scale": 1.0}, ("encoder_hidden_states", negative))


TINY: dict[str, Callable[[], Tiny]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": image_to_image,
    "StableDiffusionXLPipeline": xl,
    "StableDiffusionInstructPix2PixPipeline": instruct_pix2pix,
    "StableVideoDiffusionPipeline": video,
    "DiTPipeline": dit,
    "PixArtAlphaPipeline": pixart,
    "StableDiffusion3Pipeline": sd3,
    "SanaPipeline": sana,
    "CogVideoXPipeline": cogvideox,
    "LTXPipeline": ltx,
    "WanPipeline": wan,
    "FluxPipeline": flux,
    "QwenImagePipeline": qwen_image,
}
