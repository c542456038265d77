"""Prior guidance in stock diffusers pipelines, against the pipelines themselves and against what each row should be."""

import copy
import pickle
import warnings
from contextlib import ExitStack, contextmanager

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny_pipelines import TINY, another, cogvideox, dit, flux, instruct_pix2pix, sd3, stable_diffusion, wan

from priorguide.sample.pipeline import prior_guidance
from priorguide.sample.pipeline_hook import bound_call
from priorguide.sample.pipeline_table import PIPELINES, Row

EVERY = {**TINY, "WanPipeline of two networks": lambda: wan(two=True)}
every = pytest.mark.parametrize("name", EVERY)


@contextmanager
def counted(*networks):
    """The rows that each network's calls had, in order."""
    rows = [[] for _ in networks]
    with ExitStack() as stack:
        for network, seen in zip(networks, rows, strict=True):
            forward = network.forward

            def counting(*args, network=network, forward=forward, seen=seen, **kwargs):
                seen.append(len(next(iter(bound_call(network, args, kwargs).values()))))
                return forward(*args, **kwargs)

            network.forward = counting
            stack.callback(vars(network).pop, "forward")
        yield rows


@contextmanager
def rows_by_content(tiny, priors):
    """Every row that carries the null comes from the prior, wherever in a batch or a call it stands."""
    with ExitStack() as stack:
        for network, prior in zip(tiny.networks, priors, strict=True):
            forward = network.forward

            def mixed(*args, network=network, forward=forward, prior=prior, **kwargs):
                call = {**bound_call(network, args, kwargs), "return_dict": False}
                own, other = forward(**call)[0], prior(**call)[0]
                sample, context = next(iter(call.values())), call[tiny.null[0]]
                null = (context == tiny.null[1].expand_as(context)).flatten(1).all(1) if context.ndim > 1 else None
                null = context == tiny.null[1] if null is None else null
                if isinstance(tiny.pipe, diffusers.StableDiffusionInstructPix2PixPipeline):
                    null = null & (sample[:, 4:] == 0).flatten(1).all(1)
                out = torch.where(null.reshape(-1, *[1] * (own.ndim - 1)), other, own)
                return (out,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(sample=out)

            network.forward = mixed
            stack.callback(vars(network).pop, "forward")
        yield


def test_every_row_of_the_table_is_tested():
    assert TINY.keys() == PIPELINES.keys()
    assert all(type(make().pipe).__name__ == name for name, make in TINY.items())


@every
def test_an_equal_prior_changes_nothing(name):
    tiny = EVERY[name]()
    plain = tiny()
    with prior_guidance(tiny.pipe, [copy.deepcopy(network) for network in tiny.networks]):
        assert (tiny() - plain).abs().max() <= 1e-4
    with prior_guidance(tiny.pipe, tiny.networks):
        assert (tiny() - plain).abs().max() <= 1e-4


@every
def test_another_prior_has_the_unconditional_rows_and_no_other(name):
    tiny = EVERY[name]()
    priors = [another(network, seed=3) for network in tiny.networks]
    plain = tiny()
    with rows_by_content(tiny, priors):
        wanted = tiny()
    with prior_guidance(tiny.pipe, priors):
        guided = tiny()
    assert (guided - plain).abs().max() > 0.05
    torch.testing.assert_close(guided, wanted, rtol=1e-4, atol=1e-4)


@every
def test_without_guidance_a_pipeline_is_left_alone(name):
    tiny = EVERY[name]()
    plain = tiny(**tiny.off)
    priors = [another(network) for network in tiny.networks]
    with (
        counted(*priors) as calls,
        pytest.warns(UserWarning, match="never asked"),
        prior_guidance(tiny.pipe, priors),
    ):
        torch.testing.assert_close(tiny(**tiny.off), plain, rtol=0, atol=0)
    assert not any(calls)


def state(network):
    """All that hooks might leave on a network."""
    hooks = {
        (name, kind): len(getattr(module, kind))
        for name, module in network.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    }
    return set(vars(network)), hooks, network.forward.__func__, {k: v.clone() for k, v in network.state_dict().items()}


@every
def test_nothing_is_left_on_the_networks(name):
    tiny = EVERY[name]()
    before = [state(network) for network in tiny.networks]
    with prior_guidance(tiny.pipe, [another(network) for network in tiny.networks]):
        assert all("_diffusers_hook" in vars(network) for network in tiny.networks)
        tiny()
    for network, (names, hooks, forward, weights) in zip(tiny.networks, before, strict=True):
        assert (set(vars(network)), network.forward.__func__) == (names, forward)
        after = state(network)
        assert after[1] == hooks
        assert all(torch.equal(after[3][key], weights[key]) for key in weights)
        twin, read = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
        assert twin.forward.__self__ is twin and read.forward.__self__ is read


def test_a_failing_call_leaves_nothing_either():
    tiny = stable_diffusion()
    before, plain = state(tiny.pipe.unet), tiny()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    prior = another(tiny.pipe.unet)
    prior.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"), prior_guidance(tiny.pipe, prior):
        tiny()
    assert state(tiny.pipe.unet)[:3] == before[:3]
    assert torch.equal(tiny(), plain)


def test_within_itself_it_is_refused_and_the_outer_stays():
    tiny = stable_diffusion()
    prior = another(tiny.pipe.unet)
    with prior_guidance(tiny.pipe, prior):
        once = tiny()
        with pytest.raises(ValueError, match="within prior_guidance already"), prior_guidance(tiny.pipe, prior):
            pass
        assert torch.equal(tiny(), once)
    assert "forward" not in vars(tiny.pipe.unet)


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_other_hooks_stay():
    """On the same registry: one that was there before, and one that came within."""
    tiny, before, within = stable_diffusion(), Counting(), Counting()
    plain = tiny()
    registry = HookRegistry.check_if_exists_or_initialize(tiny.pipe.unet)
    registry.register_hook(before, "before")
    with prior_guidance(tiny.pipe, stable_diffusion().pipe.unet):
        registry.register_hook(within, "within")
        torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)
        assert (before.calls, within.calls) == (3, 3)
    assert list(registry.hooks) == ["before", "within"]
    torch.testing.assert_close(tiny(), plain, rtol=0, atol=0)
    assert (before.calls, within.calls) == (6, 6)


def test_with_group_offloading():
    tiny = stable_diffusion()
    plain, cpu = tiny(), torch.device("cpu")
    tiny.pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with prior_guidance(tiny.pipe, tiny.pipe.unet):
        torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiny(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix, sd3])
def test_several_pictures_per_prompt_and_one_of_them(make):
    tiny = make()
    priors = [another(network, 3) for network in tiny.networks]
    several = {"num_images_per_prompt": 2} if make is not sd3 else {}  # it repeats no pooled embeddings
    for options in (several, one(tiny.options)):
        with rows_by_content(tiny, priors):
            wanted = tiny(**options)
        with prior_guidance(tiny.pipe, priors):
            torch.testing.assert_close(tiny(**options), wanted, rtol=1e-4, atol=1e-4)


def one(options):
    return {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def test_rescaled_guidance():
    tiny = stable_diffusion()
    prior = another(tiny.pipe.unet, 3)
    with rows_by_content(tiny, [prior]):
        wanted = tiny(guidance_rescale=0.7)
    with prior_guidance(tiny.pipe, prior):
        torch.testing.assert_close(tiny(guidance_rescale=0.7), wanted, rtol=1e-4, atol=1e-4)
        assert (tiny() - wanted).abs().max() > 0.1


def test_a_pass_without_some_layers_is_the_pipelines_own():
    tiny = sd3()
    prior, options = another(tiny.pipe.transformer, 3), {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    options["skip_layer_guidance_start"] = 0.0
    with rows_by_content(tiny, [prior]):
        wanted = tiny(**options)
    with prior_guidance(tiny.pipe, prior):
        torch.testing.assert_close(tiny(**options), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [stable_diffusion, sd3, flux])
def test_half_precision(make):
    tiny = make()
    tiny.pipe.to(torch.bfloat16)
    options = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in tiny.options.items()}
    plain = tiny(**options)
    with prior_guidance(tiny.pipe, [copy.deepcopy(network) for network in tiny.networks]):
        same = tiny(**options)
    assert same.dtype == plain.dtype
    assert (same.float() - plain.float()).abs().max() <= 0.05 * plain.float().abs().max()
    with pytest.raises(ValueError, match="computes in torch.bfloat16"):
        prior_guidance(tiny.pipe, another(tiny.networks[0]).float()).__enter__()


def test_outputs_of_either_kind():
    network = dit().pipe.transformer
    tiny = dit()
    x, t, labels = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([9, 9]), torch.tensor([2, 1000])
    with prior_guidance(tiny.pipe, another(network)):
        hooked = tiny.pipe.transformer
        as_tuple = hooked(x, timestep=t, class_labels=labels, return_dict=False)
        as_output = hooked(x, timestep=t, class_labels=labels)
    assert torch.equal(as_tuple[0], as_output.sample) and torch.equal(as_output[0], as_output.sample)


def test_a_learned_variance_stays_the_own_where_the_prior_has_none():
    tiny, prior = dit(), diffusers.DiTTransformer2DModel(**{**dict(dit().pipe.transformer.config), "out_channels": 4})
    x, t, labels = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([9, 9]), torch.tensor([2, 1000])
    own = tiny.pipe.transformer(x, timestep=t, class_labels=labels).sample
    with prior_guidance(tiny.pipe, prior.eval()):
        out = tiny.pipe.transformer(x, timestep=t, class_labels=labels).sample
    torch.testing.assert_close(out[1, 4:], own[0, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1, :4], prior(x[1:], t[1:], labels[1:]).sample[0], rtol=1e-5, atol=1e-5)


def test_what_has_no_batch_is_not_split():
    """A rotary embedding of as many places as the batch has rows."""
    tiny = cogvideox()
    doubled = {k: torch.cat([v, v.flip(0)]) if torch.is_tensor(v) else v for k, v in tiny.options.items()}
    plain = tiny(**doubled)
    with counted(tiny.pipe.transformer) as (rows,):
        tiny(**doubled)
    assert rows[0] == 8 == 2 * 2 * 2  # frames, height and width in patches
    with prior_guidance(tiny.pipe, copy.deepcopy(tiny.pipe.transformer)):
        torch.testing.assert_close(tiny(**doubled), plain, rtol=1e-4, atol=1e-4)


def test_a_compiled_network():
    tiny = wan()
    plain, network = tiny(), tiny.networks[0]
    tiny.pipe.transformer = torch.compile(network, backend="eager")
    before = state(network)
    with prior_guidance(tiny.pipe, copy.deepcopy(network)):
        torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)
    assert state(network)[:3] == before[:3]
    torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)


def test_a_null_of_the_priors_own():
    """A prior of another context width, as Stable Diffusion 2 is to 1."""
    from priorguide.sample.published import tiny_unet

    tiny = stable_diffusion()
    prior, context = another(tiny_unet(4, width=24)), torch.randn(1, 8, 24)
    with pytest.raises(ValueError, match="give the prior's own null"), prior_guidance(tiny.pipe, prior):
        pass
    seen = []
    hook = prior.register_forward_pre_hook(
        lambda m, args, kw: seen.append(kw["encoder_hidden_states"]), with_kwargs=True
    )
    with prior_guidance(tiny.pipe, prior, null={"encoder_hidden_states": context}):
        tiny()
    hook.remove()
    assert len(seen) == 3 and all(torch.equal(given, context.expand(2, -1, -1)) for given in seen)


def test_an_interval_saves_evaluations():
    tiny = stable_diffusion()
    times = tiny.pipe.scheduler
    times.set_timesteps(3)
    middle, prior = float(times.timesteps[1]), another(tiny.pipe.unet, 3)
    with counted(tiny.pipe.unet, prior) as (own, others), prior_guidance(tiny.pipe, prior, interval=(middle, middle)):
        guided = tiny()
    assert (own, others) == ([2, 2, 2], [2])
    with prior_guidance(tiny.pipe, prior, interval=(5000.0, 6000.0)):
        torch.testing.assert_close(tiny(), tiny(**tiny.off), rtol=1e-4, atol=1e-4)
    with prior_guidance(tiny.pipe, prior):
        assert (tiny() - guided).abs().max() > 0.05


@pytest.mark.parametrize("make", [stable_diffusion, flux, instruct_pix2pix])
def test_the_difference_is_taken_again_between_refreshes(make):
    tiny = make()
    prior, steps = another(tiny.networks[0], 3), 5
    options = {"num_inference_steps": steps}
    with counted(prior) as (others,), prior_guidance(tiny.pipe, prior, refresh=2):
        first = tiny(**options)
        assert len(others) == 3
        tiny(seed=1, **options)
        assert len(others) == 6  # a new picture begins with the prior, whatever came before
        assert torch.equal(tiny(**options), first)


def test_what_a_refreshed_difference_is():
    tiny = flux()
    prior, steps = another(tiny.networks[0], 3), 4
    with prior_guidance(tiny.pipe, prior, refresh=2):
        found = tiny(num_inference_steps=steps)
    forward, calls, held = tiny.networks[0].forward, [], {}

    def by_hand(**call):
        step, unconditional = divmod(len(calls), 2)
        calls.append(None)
        if not unconditional:
            held["own"] = forward(**call)[0]
            return (held["own"],)
        if step % 2 == 0:
            held["difference"] = held["own"] - prior(**call)[0]
        return (held["own"] - held["difference"],)

    tiny.networks[0].forward = by_hand
    torch.testing.assert_close(tiny(num_inference_steps=steps), found, rtol=1e-5, atol=1e-5)


def test_one_network_of_two():
    tiny = wan(two=True)
    first, second = tiny.networks
    priors = [another(first, 3), another(second, 4)]
    with counted(*priors) as calls, prior_guidance(tiny.pipe, [priors[0], None]):
        tiny()
    assert calls[0] and not calls[1]
    with counted(*priors) as calls, prior_guidance(tiny.pipe, priors[0]):
        tiny()
    assert len(calls[0]) == 3
    with pytest.raises(ValueError, match="2 network"), prior_guidance(tiny.pipe, [priors[0]]):
        pass


class OtherPipeline(diffusers.StableDiffusionPipeline):
    pass


def test_an_unknown_pipeline_is_refused_until_it_is_described():
    tiny = stable_diffusion()
    pipe = OtherPipeline(**tiny.pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r'PIPELINES\["OtherPipeline"\] = Row'), prior_guidance(pipe, pipe.unet):
        pass
    PIPELINES["OtherPipeline"] = Row(("unet",), (0, 1))
    try:
        plain, tiny.pipe = tiny(), pipe
        pipe.set_progress_bar_config(disable=True)
        with prior_guidance(pipe, copy.deepcopy(pipe.unet)):
            torch.testing.assert_close(tiny(), plain, rtol=1e-4, atol=1e-4)
        PIPELINES["OtherPipeline"] = Row(("unet",), (2, 1, 0))
        with pytest.raises(ValueError, match="correct the row"), prior_guidance(pipe, pipe.unet):
            tiny()
    finally:
        del PIPELINES["OtherPipeline"]


def test_priors_that_do_not_fit():
    tiny = stable_diffusion()
    pipe, unet = tiny.pipe, tiny.pipe.unet
    for prior, reason in (
        (dit().pipe.transformer, "must be a UNet2DConditionModel"),
        (instruct_pix2pix().pipe.unet, "takes 8 channels, the pipeline gives 4"),
        (another(unet).train(), "train mode"),
        ("base", "has none"),
        (3, "prior must be a network"),
    ):
        with pytest.raises(ValueError, match=reason), prior_guidance(pipe, prior):
            pass
    for options, reason in (
        ({"null": {"text": torch.zeros(1)}}, "null names"),
        ({"interval": (5.0, 1.0)}, "interval"),
        ({"refresh": 0}, "refresh"),
    ):
        with pytest.raises(ValueError, match=reason), prior_guidance(pipe, another(unet), **options):
            pass
    with pytest.raises(ValueError, match="either rungs"):
        Row(("unet",))
    pipe._all_hooks = ["accelerate's"]
    with pytest.raises(ValueError, match="enable_group_offload"), prior_guidance(pipe, another(unet)):
        pass
    assert "_diffusers_hook" not in vars(unet)


def test_no_warning_where_the_prior_had_its_part():
    tiny = stable_diffusion()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with prior_guidance(tiny.pipe, another(tiny.pipe.unet)):
            tiny()
