"""What may guide a stock pipeline besides a network of its own kind: models of ours, the base of an adapter, and the
guider of Modular pipelines; and a bundle as a stock pipeline."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_pipelines import (
    another,
    cogvideox,
    embeds,
    flux,
    instruct_pix2pix,
    sana,
    sd3,
    shaken,
    stable_diffusion,
    video,
    wan,
)

from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.latents import latent_space
from priorguide.sample.loop import Sampler, trajectories
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixart import PixArt
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.noise import DiscretePath
from priorguide.sample.pipeline import prior_guidance, stock_pipeline
from priorguide.sample.pipeline_guider import PriorGuidance


def stable_model(prediction="epsilon"):
    model = StableDiffusion.tiny().eval()
    shaken(model.network, 3)
    model.prediction = prediction
    return model


def other_path(model):
    model.path = DiscretePath.linear()
    return model


@pytest.mark.parametrize(
    "make",
    [stable_model, lambda: stable_model("v_prediction"), lambda: other_path(stable_model()), lambda: tiny_pixart()],
    ids=["its own kind", "v", "another schedule", "PixArt"],
)
@pytest.mark.filterwarnings("ignore:the prior .* knows log-SNR")
def test_a_model_of_ours_guides_as_in_our_own_loop(make):
    tiny, prior = instruct_pix2pix(), make()
    model = InstructPix2Pix.tiny().eval()
    model.network = tiny.pipe.unet
    prior.space = model.space = space_of(tiny.pipe)
    sampler = Sampler("ddim", 4, options={"steps_offset": 1, "set_alpha_to_one": False})
    image = tiny.pipe.vae.encode(2 * tiny.options["image"] - 1).latent_dist.mode()
    condition = {"image": image, "text": tiny.options["prompt_embeds"]}
    tiny.options["negative_prompt_embeds"] = model.null_text.expand(2, -1, -1)
    guidance = Guidance((1.5, 4.0), unconditional(prior, onto=model))
    wanted = trajectories(model, condition, [5, 6], [guidance], scheduler=sampler.make(model), steps=4)[0]
    given = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    for either in (prior, guidance.prior):
        with prior_guidance(tiny.pipe, either):
            found = tiny.pipe(
                generator=[g.manual_seed(s) for g, s in zip(given, (5, 6), strict=True)],
                **tiny.options,
                num_inference_steps=4,
                output_type="latent",
            ).images
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def tiny_pixart():
    """Four channels as the pipeline's, and a learned variance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArt.tiny().eval()
    shaken(model.network, 3)
    return model


def test_a_model_of_ours_along_a_flow():
    """Stable Diffusion 3 goes along a straight path: the prior is met at equal log-SNR, its eps made a velocity."""
    tiny, prior = sd3(), stable_model()
    prior.space = space_of(tiny.pipe)
    with pytest.warns(UserWarning, match="knows log-SNR"), prior_guidance(tiny.pipe, prior):
        guided = tiny()
    assert guided.isfinite().all() and (guided - tiny()).abs().max() > 0.01


def space_of(pipe):
    return latent_space(pipe.vae)


def test_models_of_ours_that_do_not_fit():
    tiny, model, edits = stable_diffusion(), stable_model(), InstructPix2Pix.tiny()
    for pipe, prior, reason in (
        (tiny.pipe, model, "predictions mix only in one"),
        (flux().pipe, model, "packs its latents"),
        (
            tiny.pipe,
            unconditional(edits, edits, frozenset({"image"})),
            "keep nothing",
        ),
        (tiny.pipe, copy.deepcopy(model).train(), "train mode"),
    ):
        with pytest.raises(ValueError, match=reason), prior_guidance(pipe, prior):
            pass
    model.space = space_of(tiny.pipe)
    with pytest.raises(ValueError, match="its own null"), prior_guidance(tiny.pipe, model, null={"sample": embeds(1)}):
        pass


def adapted(network, seed=0, name="default", **options):
    """The network with an adapter that does something, in place."""
    layers = [
        n for n, m in network.named_modules() if n.endswith(("to_q", "to_k", "to_out.0", "conv1", "time_emb_proj"))
    ]
    assert layers
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=layers, **options), network, name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if f"lora_B.{name}" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix, video, sd3, sana, cogvideox, wan, flux])
def test_the_base_of_an_adapter(make):
    tiny, bases = make(), make().networks
    for network in tiny.networks:
        adapted(network)
    own = tiny()
    with prior_guidance(tiny.pipe, bases):
        wanted = tiny()
    seen = []
    hooks = [n.register_forward_pre_hook(lambda m, a, k: seen.append(1), with_kwargs=True) for n in tiny.networks]
    with prior_guidance(tiny.pipe, "base"):
        found = tiny()
    calls = len(seen)
    tiny()
    assert calls == len(seen) - calls, "as many calls as self guidance"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - own).abs().max() > 0.01
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks for n in tiny.networks for m in n.modules())


def test_what_an_adapter_trains_in_full_is_off_too():
    tiny, base = stable_diffusion(), stable_diffusion().pipe.unet
    layers = [n for n, _ in base.named_modules() if n.endswith(("to_q", "to_v"))]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=layers, modules_to_save=["conv_in"]), tiny.pipe.unet)
    for name, parameter in tiny.pipe.unet.named_parameters():
        if "modules_to_save.default" in name or "lora_B" in name:
            parameter.data += 0.2
    tiny.pipe.unet.eval()
    with prior_guidance(tiny.pipe, copy.deepcopy(tiny.pipe.unet)):
        own = tiny()
    with prior_guidance(tiny.pipe, base):
        wanted = tiny()
    with prior_guidance(tiny.pipe, "base"):
        found = tiny()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - own).abs().max() > 0.01


def test_adapters_that_cannot_be_split():
    tiny = stable_diffusion()
    unet = adapted(adapted(tiny.pipe.unet), seed=1, name="second")
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one active adapter, found \['default', 'second'\]"):
        prior_guidance(tiny.pipe, "base").__enter__()
    with pytest.raises(ValueError, match="give no null"):
        prior_guidance(tiny.pipe, "base", null={"sample": embeds(1)}).__enter__()
    tiny = stable_diffusion()
    adapted(tiny.pipe.unet, use_dora=True)
    with pytest.raises(ValueError, match="DoRA"), prior_guidance(tiny.pipe, "base"):
        tiny()
    assert not any(m._forward_pre_hooks for m in tiny.pipe.unet.modules())


def bundle_of(model, guidance, **options):
    """The parts of a Bundle that a stock pipeline is made of."""
    sampler = Sampler("ddim", 4, eta=0.0, options=options)
    scheduler = sampler.make(model)
    scheduler.set_timesteps(4)
    return SimpleNamespace(model=model, guidance=guidance, sampler=sampler, scheduler=scheduler, folder="bundle")


def model_of(kind, seed):
    model = kind.tiny().eval()
    shaken(model.network, seed)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"interval": (300.0, 800.0)}, {"refresh": 3}, {"interval": (200.0, 800.0), "refresh": 2}, {"rescale": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("kind", [StableDiffusion, InstructPix2Pix])
def test_a_bundle_as_a_stock_pipeline(kind, with_prior, options, tmp_path):
    model, base = model_of(kind, 1), model_of(StableDiffusion, 2)
    prior = unconditional(base, onto=model) if with_prior else None
    scales = (4.0,) if kind is StableDiffusion else (1.5, 4.0)
    guidance = Guidance(scales, prior, **options)
    bundle = bundle_of(model, guidance)
    if kind is InstructPix2Pix and "rescale" in options:
        with pytest.raises(ValueError, match="guidance_rescale"):
            stock_pipeline(bundle)
        return
    pipe = stock_pipeline(bundle)
    pipe.set_progress_bar_config(disable=True)
    prompts, seeds, image = ["red", "blue"], [5, 6], embeds(2, 3, 16, 16).clamp(-1, 1) / 2 + 0.5
    batch = {"text": prompts, **({"image": image} if kind is InstructPix2Pix else {})}
    condition = model.encode_condition(batch)
    wanted = trajectories(model, condition, seeds, [guidance], scheduler=bundle.scheduler, steps=4)[0]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"image": image} if kind is InstructPix2Pix else {}
    found = pipe(prompts, **given, generator=generators, output_type="latent").images
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(model.network)
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(stock) is getattr(diffusers, type(pipe).__name__)


def test_a_call_may_say_otherwise():
    model, base = model_of(StableDiffusion, 1), model_of(StableDiffusion, 2)
    pipe = stock_pipeline(bundle_of(model, Guidance((4.0,), unconditional(base, onto=model))))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    hook = base.network.register_forward_hook(lambda *args: seen.append(1))
    pipe("red", output_type="latent", num_inference_steps=2)
    assert len(seen) == 2
    with pytest.warns(UserWarning, match="never asked"):
        pipe("red", 16, 16, 3, output_type="latent", guidance_scale=1.0)
    assert len(seen) == 2
    hook.remove()


def test_bundles_that_no_stock_pipeline_follows():
    model = model_of(StableDiffusion, 1)
    prior = unconditional(model_of(StableDiffusion, 2), onto=model)
    for bundle, reason in (
        (bundle_of(model, Guidance((4.0,), prior, mix=0.5)), "Bundle.sample"),
        (bundle_of(model, Guidance((4.0,), prior, channels=3)), "Bundle.sample"),
        (bundle_of(model, Guidance((4.0,), prior, guider="apg")), "Bundle.sample"),
        (bundle_of(model, Guidance((0.5,), prior)), "below 1"),
        (SimpleNamespace(**{**vars(bundle_of(model, None)), "guidance": None}), "without guidance"),
        (bundle_of(tiny_pixart(), Guidance((4.0,))), "no stock pipeline of a PixArt"),
    ):
        with pytest.raises(ValueError, match=reason):
            stock_pipeline(bundle)
    model.tokenizer = None
    with pytest.raises(ValueError, match="came without"):
        stock_pipeline(bundle_of(model, Guidance((4.0,))))


def modular(guider, transformer, scheduler):
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_guider_of_modular_pipelines():
    tiny = wan()
    network, given = tiny.networks[0], {k: tiny.options[k] for k in ("prompt_embeds", "negative_prompt_embeds")}
    given["latents"] = embeds(2, 4, 2, 2, 2)
    given |= {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3}
    prior = another(network, 3)

    def run(guider):
        pipe = modular(guider, network, copy.deepcopy(tiny.pipe.scheduler))
        return pipe(**given, output="latents")

    plain = run(diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    torch.testing.assert_close(run(PriorGuidance(copy.deepcopy(network), guidance_scale=4.0)), plain, rtol=0, atol=1e-4)
    guider = PriorGuidance(prior, guidance_scale=4.0)
    with prior_guidance(tiny.pipe, prior):
        wanted = tiny(latents=given["latents"])
    for own in (guider, guider.new(guidance_scale=4.0)):
        torch.testing.assert_close(run(own), wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.05
    assert not {"forward", "_diffusers_hook"} & set(vars(network))
    prior.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(guider)
    assert not {"forward", "_diffusers_hook"} & set(vars(network))
