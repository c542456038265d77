"""Candidates: any network, an earlier checkpoint, parts that the prior keeps, a mix, each with its own options."""

import copy

import pytest
import torch
from oracle import pixel_condition, pixel_model

from priorguide.sample.candidates import Candidate, arms, at_checkpoint
from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import make_scheduler, sample, trajectories
from priorguide.sample.model import keep_only


def shaken(model, seed):
    """A copy whose weights have moved."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def model():
    return pixel_model()


@pytest.fixture
def checkpoint(model, tmp_path):
    """A training checkpoint of the model as it was: live and averaged weights, which differ."""
    live, average = (shaken(model, seed).network.state_dict() for seed in (1, 2))
    state = {f"model.network.{name}": value for name, value in live.items()}
    state |= {f"average.{name}": value for name, value in average.items()}
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "step.ckpt")
    return str(tmp_path / "step.ckpt")


def draw(model, guidance):
    scheduler = make_scheduler(model)
    return trajectories(model, pixel_condition(), [1, 2, 3], [guidance], scheduler=scheduler, steps=3)[0]


def test_every_candidate_at_its_own_scales_with_its_own_options(model):
    base = shaken(model, 3)
    candidates = {
        "self": Candidate(),
        "base": Candidate(base, scales=[2.0, 3.0]),
        "half": Candidate(base, mix=0.5, interval=(100, 800), rescale=0.3, refresh=2),
        "apg": Candidate(base, guider="apg"),
    }
    bound = {name: candidate.bind(model) for name, candidate in candidates.items()}
    found = arms(candidates, bound, [1.5])
    assert [*found] == [("self", (1.5,)), ("base", (2.0,)), ("base", (3.0,)), ("half", (1.5,)), ("apg", (1.5,))]
    half = found["half", (1.5,)]
    assert (half.mix, half.interval, half.rescale, half.refresh) == (0.5, (100, 800), 0.3, 2)
    assert half.prior.model is base
    assert found["self", (1.5,)].prior is None and found["apg", (1.5,)].guider == "apg"
    assert {scales for _, scales in arms(candidates, bound, [4.0], override=True)} == {(4.0,)}
    for guidance in found.values():
        guidance.check(model)


@pytest.mark.parametrize(("weights", "seed"), [("average", 2), ("model", 1)])
def test_an_earlier_checkpoint_is_the_model_with_its_weights(model, checkpoint, weights, seed):
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    earlier = Candidate(checkpoint=checkpoint, weights=weights)
    found = draw(model, earlier.guidance((3.0,), earlier.bind(model)))
    expected = draw(model, Candidate().guidance((3.0,), unconditional(shaken(model, seed), onto=model)))
    assert torch.equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert not any(p.requires_grad for p in earlier.bind(model).model.network.parameters())


def test_a_prior_that_keeps_a_part_sees_it(model):
    base = shaken(model, 3)
    for prior in (None, base):
        candidate = Candidate(prior, keep=("image",))
        bound = candidate.bind(model)
        kept = keep_only(bound.model, pixel_condition(), ("image",), 3)
        own = bound.condition(pixel_condition(), 3)
        assert all(torch.equal(own[name], kept[name]) for name in kept)
        without = Candidate(prior).guidance((3.0,), Candidate(prior).bind(model))
        assert not torch.allclose(draw(model, candidate.guidance((3.0,), bound)), draw(model, without), atol=1e-3)


def test_self_needs_no_second_network(model):
    scheduler = make_scheduler(model)
    own = sample(model, pixel_condition(), [1, 2, 3], scheduler=scheduler, scales=[3.0], steps=3)
    assert Candidate().bind(model) is None
    assert torch.equal(draw(model, Candidate().guidance((3.0,), None)), own)


def test_what_does_not_fit_is_refused(model, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="either a prior or a checkpoint, got both"):
        Candidate(model, checkpoint).bind(model)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        Candidate(checkpoint="none.ckpt").bind(model)
    with pytest.raises(ValueError, match="holds another network than the run's"):
        at_checkpoint(pixel_model(num_classes=5), checkpoint, "average")
    torch.save({"state_dict": {"other": torch.zeros(1)}}, other := tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"holds no average weights of this network \(average\.\*\)"):
        at_checkpoint(model, str(other), "average")
    with pytest.raises(ValueError, match=r"keep names \['depth'\]"):
        Candidate(keep=("depth",)).bind(model)
