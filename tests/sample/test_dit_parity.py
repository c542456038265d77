"""DiT beside the original's own outputs."""

import parity
import pytest
import torch

from priorguide.sample.guidance import Guidance, combine, unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork, position_table, time_features
from priorguide.sample.noise import add_noise
from priorguide.train.fine_tune import FineTune


@pytest.fixture(scope="module")
def vectors():
    return parity.vectors("dit")


@pytest.fixture(scope="module")
def models(vectors, tmp_path_factory):
    """The fine-tuned network and its base, each read from a file in the original layout."""
    loaded = {}
    for name, described in vectors.spec["networks"].items():
        sizes = described["model"]
        weights = vectors.weights(name)
        weights["pos_embed"] = position_table(sizes["input_size"] // sizes["patch_size"], sizes["hidden_size"])
        file = tmp_path_factory.mktemp("dit") / f"{name}.pt"
        torch.save(weights, file)
        loaded[name] = DiT.from_pretrained(file, num_heads=sizes["num_heads"], space="latents").eval()
    return loaded


def labels(vectors):
    return {"label": vectors.io["y"]}


@torch.no_grad()
def predict(model, vectors, condition):
    return model.denoise(vectors.io["x_t"], vectors.io["t"], condition)


@torch.no_grad()
def whole(model, vectors, label):
    return model.network(vectors.io["x_t"], vectors.io["t"], label)


def test_parity_weight_rule(vectors):
    for name, described in vectors.spec["networks"].items():
        weights = vectors.weights(name)
        for key, values in described["rule_check"].items():
            torch.testing.assert_close(weights[key].flatten()[:4], torch.tensor(values))


def test_parity_sizes_are_read_off_the_file(vectors, models):
    for name, described in vectors.spec["networks"].items():
        config, sizes = models[name].network.config, described["model"]
        own = {size: config[size] for size in sizes if size in config}
        assert own == {size: value for size, value in sizes.items() if size != "class_dropout_prob"}
        assert sum(p.numel() for p in models[name].network.parameters()) == described["parameters"]


def test_parity_noise_schedule(vectors, models):
    path, io = models["finetuned"].path, vectors.io
    assert vectors.error(path.alphas_cumprod.float(), "alphas_cumprod") < 1e-6
    assert vectors.error(add_noise(io["x0"], io["noise"], *path.coefficients(io["t"])), "x_t") < 1e-5


@torch.no_grad()
def test_parity_embeddings(vectors, models):
    network, model = models["finetuned"].network, models["finetuned"]
    assert vectors.error(time_features(vectors.io["t"]), "t_freq") < parity.NETWORK_TOLERANCE
    assert vectors.error(network.t_embedder(vectors.io["t"]), "t_emb") < parity.NETWORK_TOLERANCE
    dropped = torch.tensor([True, False, True, False])
    label = torch.where(dropped, model.null(labels(vectors))["label"], vectors.io["y"])
    assert vectors.error(network.y_embedder(label), "y_emb_drop") < parity.NETWORK_TOLERANCE


def test_parity_network_outputs(vectors, models):
    tolerance = parity.NETWORK_TOLERANCE
    for name, prefix, label in (("finetuned", "", "y"), ("prior", "prior.", "y_prior")):
        null = models[name].null({"label": vectors.io[label]})["label"]
        assert vectors.error(whole(models[name], vectors, vectors.io[label]), f"{prefix}out_cond") < tolerance
        assert vectors.error(whole(models[name], vectors, null), f"{prefix}out_null") < tolerance


BASES = [("finetuned", ""), ("prior", "_prior")]
"""Whose null prediction the guidance starts from, and what the references of that are called."""


@pytest.mark.parametrize(("base", "suffix"), BASES)
@torch.no_grad()
def test_parity_guided_predictions(vectors, models, base, suffix):
    model, condition, io = models["finetuned"], labels(vectors), vectors.io
    scales = (vectors.spec["guidance"]["g"],)
    conditional, variance = model.denoise_with_variance(io["x_t"], io["t"], condition)
    prior = unconditional(models[base], onto=model)
    out = predict(prior.model, vectors, prior.condition(condition, len(io["y"])))
    ladder = [prior.express(out, io["x_t"], io["t"]), conditional]
    everywhere = combine(Guidance(scales, prior), ladder, scales)
    assert vectors.relative_error(everywhere, f"guided_eps{suffix or '_own'}") < parity.GUIDED_TOLERANCE
    of_three = combine(Guidance(scales, prior, channels=3), ladder, scales)
    assert vectors.relative_error(torch.cat([of_three, variance], 1), f"out_cfg3{suffix}") < parity.GUIDED_TOLERANCE


def trajectory(vectors, models, base, scheduler, **options):
    """Samples from the vectors' own start, guided by the null prediction of `base`."""
    model = models["finetuned"]
    return sample(
        model,
        labels(vectors),
        range(len(vectors.io["z"])),
        scheduler=scheduler,
        scales=[vectors.spec["guidance"]["g"]],
        prior=unconditional(models[base], onto=model),
        noise=vectors.io["z"],
        **options,
    )


def falling(vectors):
    return vectors.io["respaced_timesteps"].flip(0).tolist()


@pytest.mark.parametrize(("base", "suffix"), BASES)
def test_parity_ddim(vectors, models, base, suffix):
    # The timesteps are 111 apart. diffusers' DDIMScheduler steps by 1000 // 10 whatever its spacing; the first-order
    # DPM-Solver++ is the same sampler (arXiv 2211.01095, section 4) and takes the timesteps themselves.
    scheduler = make_scheduler(models["finetuned"], "dpm++", solver_order=1, final_sigmas_type="zero")
    found = {
        name: trajectory(vectors, models, base, scheduler, timesteps=falling(vectors), channels=channels)
        for name, channels in (("", 3), ("_4ch", None))
    }
    assert vectors.relative_error(found[""], f"ddim10{suffix}") < parity.TRAJECTORY_TOLERANCE
    if suffix:
        assert vectors.relative_error(found["_4ch"], f"ddim10{suffix}_4ch") < parity.TRAJECTORY_TOLERANCE
    assert vectors.relative_error(found["_4ch"], f"ddim10{suffix}") > 0.1


@pytest.mark.parametrize(("base", "suffix"), BASES)
def test_parity_ancestral_with_the_learned_variance(vectors, models, base, suffix):
    io = vectors.io
    options = {"channels": 3, "step_noise": io["sampler_noise"]}
    scheduler = make_scheduler(models["finetuned"], "ddpm", variance_type="learned_range")
    found = trajectory(vectors, models, base, scheduler, timesteps=falling(vectors), **options)
    assert vectors.relative_error(found, f"ancestral10{suffix}") < parity.TRAJECTORY_TOLERANCE
    fixed = make_scheduler(models["finetuned"], "ddpm")
    found = trajectory(vectors, models, base, fixed, timesteps=falling(vectors), **options)
    assert vectors.relative_error(found, f"ancestral10{suffix}") > 5 * parity.TRAJECTORY_TOLERANCE


def test_parity_respaced_timesteps(vectors, models):
    scheduler = make_scheduler(models["finetuned"], "ddpm", timestep_spacing="linspace", variance_type="learned_range")
    scheduler.set_timesteps(len(vectors.io["respaced_timesteps"]))
    assert scheduler.timesteps.tolist() == falling(vectors)


@torch.no_grad()
def test_parity_training_loss(vectors, models):
    model, io = models["finetuned"], vectors.io
    found = {
        weight: FineTune(model, vb_weight=weight, ema_decay=0).loss(io["x0"], labels(vectors), io["noise"], io["t"])
        for weight in (0.0, 1.0)
    }
    assert vectors.error(found[0.0], "train_mse") < parity.NETWORK_TOLERANCE
    assert vectors.error(found[1.0] - found[0.0], "train_vb") < parity.NETWORK_TOLERANCE
    assert vectors.error(found[1.0], "train_loss") < parity.NETWORK_TOLERANCE


def test_parity_null_is_the_last_row(vectors, models):
    for name, described in vectors.spec["networks"].items():
        null = keep_only(models[name], {}, frozenset(), 2)["label"]
        assert null.tolist() == [described["model"]["num_classes"]] * 2


def test_parity_through_saved_folders(vectors, models, tmp_path):
    models["prior"].network.save_pretrained(tmp_path, max_shard_size="200KB")
    network = DiT.load_network(str(tmp_path))
    assert isinstance(network, DiTNetwork)
    model = DiT(network, space="latents").eval()
    assert vectors.error(whole(model, vectors, vectors.io["y_prior"]), "prior.out_cond") < parity.NETWORK_TOLERANCE
