"""DiT beside the original's own outputs."""

import parity
import pytest
import torch

from priorguide.sample.guidance import guide, unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import keep_only
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dit_network import DiTNetwork, position_table, time_features
from priorguide.sample.noise import add_noise


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


def test_parity_guided_predictions(vectors, models):
    model, condition = models["finetuned"], labels(vectors)
    conditional = predict(model, vectors, condition)
    for base, name in ((model, "guided_eps_own"), (models["prior"], "guided_eps_prior")):
        prior = unconditional(base, onto=model)
        out = predict(prior.model, vectors, prior.condition(condition, len(vectors.io["y"])))
        lowest = prior.express(out, vectors.io["x_t"], vectors.io["t"])
        guided = guide([lowest, conditional], [vectors.spec["guidance"]["g"]])
        assert vectors.relative_error(guided, name) < parity.GUIDED_TOLERANCE


def test_parity_sampled_with_the_base_as_prior(vectors, models):
    model, io = models["finetuned"], vectors.io
    # DDIM on timesteps that are 111 apart. diffusers' DDIMScheduler steps by 1000 // 10 whatever its spacing; the
    # first-order DPM-Solver++ is the same sampler (arXiv 2211.01095, section 4) and takes the timesteps themselves.
    scheduler = make_scheduler(model, "dpm++", solver_order=1, final_sigmas_type="zero")
    arguments = {
        "seeds": range(len(io["z"])),
        "scheduler": scheduler,
        "scales": [vectors.spec["guidance"]["g"]],
        "timesteps": io["respaced_timesteps"].flip(0).tolist(),
        "noise": io["z"],
    }
    pictures = sample(model, labels(vectors), prior=unconditional(models["prior"], onto=model), **arguments)
    assert vectors.relative_error(pictures, "ddim10_prior_4ch") < parity.TRAJECTORY_TOLERANCE
    own = sample(model, labels(vectors), **arguments)
    assert vectors.relative_error(own, "ddim10_prior_4ch") > 0.1


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
