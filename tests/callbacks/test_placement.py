"""Where priors' networks lie between and during comparisons, and that pictures do not depend on it."""

import pytest
import torch
from fits import Pictures, Seer, trainer, tuning
from oracle import pixel_model

from priorguide.callbacks import placement
from priorguide.callbacks.comparison import PriorComparison
from priorguide.callbacks.placement import Placement, without_copies
from priorguide.sample.candidates import Candidate
from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.models.pixel import PixelUNet
from priorguide.train.adapters import Lora, add_adapter

pytestmark = pytest.mark.usefixtures("reproducible")
CUDA = torch.device("cuda", 0)


def evaluations(folder, way, device="cpu"):
    """The two comparisons of a short run, and the callback."""
    torch.manual_seed(0)
    prior = pixel_model(7, num_classes=0, image_channels=0)
    options = {"num_conditions": 4, "num_pictures": 2, "num_reference": 8, "batch_size": 4}
    callback = PriorComparison(
        {"self": None, "base": prior}, [2.0], Sampler(steps=2), 2, metric_network=Seer(), prior_placement=way, **options
    )
    seen = []
    callback.evaluate = lambda *a, **k: seen.append(PriorComparison.evaluate(callback, *a, **k)) or seen[-1]
    tune = tuning()
    accelerator = {"cuda": "gpu"}.get(device, device)
    trainer(folder, 4, callbacks=[callback], accelerator=accelerator).fit(tune, Pictures())
    return [evaluation.pictures["base", (2.0,)] for evaluation in seen], callback, tune


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pictures_do_not_depend_on_it(tmp_path, device):
    wanted, _, _ = evaluations(tmp_path, "auto", device)
    for way in ("device", "cpu", "streamed"):
        found, callback, _ = evaluations(tmp_path, way, device)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if device == "cpu" else 1e-4)
        where = next(callback.priors["base"].prior.network.parameters()).device.type
        assert where == (device if way == "device" else "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("way", "error"), [("int8", 2e-2), ("nf4", 0.3)])
def test_in_fewer_bits_what_it_changes_is_said_once(tmp_path, capsys, way, error, device):
    wanted, _, _ = evaluations(tmp_path, "device", device)
    capsys.readouterr()
    found, callback, tune = evaluations(tmp_path, way, device)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("prior "))
    assert line.startswith(f"prior base lies on {device}") and f" in {way}, " in line and "at scale 2.0 by " in line
    assert 0 < float(line.split(" by ")[1].split()[0]) < error
    for a, b in zip(found, wanted, strict=True):
        assert 0 < (a - b).abs().mean() < error
    # The prior itself is as it was, and what decides takes it whole.
    full, exact = (
        c.evaluate(tune, Pictures(), full=True).pictures["base", (2.0,)]
        for c in (callback, evaluations(tmp_path, "device", device)[1])
    )
    torch.testing.assert_close(full, exact, rtol=0, atol=1e-6 if device == "cpu" else 1e-4)
    before = pixel_model(7, num_classes=0, image_channels=0).network.state_dict()
    assert all(torch.equal(v.cpu(), before[k]) for k, v in callback.priors["base"].prior.network.state_dict().items())


@pytest.mark.parametrize(
    ("spare", "free", "way", "words"),
    [
        (2.1, 9.0, "device", "stay on cuda:0: of its memory training leaves"),
        (1.9, 1.3, "cpu", "wait on the CPU between comparisons"),
        (0.1, 1.2, "streamed", "are streamed from the CPU to cuda:0, layer by layer"),
    ],
)
def test_the_memory_at_hand_chooses(monkeypatch, capsys, spare, free, way, words):
    model = pixel_model(0)
    prior = unconditional(pixel_model(7, num_classes=0, image_channels=0), onto=model)
    need = sum(p.numel() * 4 for p in prior.model.network.parameters())
    monkeypatch.setattr(placement, "memory", lambda device: (int(spare * need), int(free * need)))
    found, networks = Placement("auto"), {0: prior.model.network}
    assert found.choose({"base": prior}, networks, CUDA, quiet=False) == way
    assert words in (said := capsys.readouterr().out) and said.startswith("priors (base: ")
    monkeypatch.setattr(placement, "memory", lambda device: (10**12, 10**12))
    assert found.choose({"base": prior}, networks, CUDA, quiet=False) == way  # once and for all
    assert not capsys.readouterr().out


def test_a_place_that_there_is_not():
    with pytest.raises(ValueError, match="prior_placement must be one of auto, device, cpu, .*, got 'gpu'"):
        PriorComparison({"self": None}, [2.0], prior_placement="gpu")


def test_beside_an_adapter_each_network_of_its_own_is_said(capsys):
    base, other = (pixel_model(seed, num_classes=0, image_channels=0) for seed in (3, 4))
    model = PixelUNet.from_base(base, num_classes=3, image_channels=1)
    given = {"self": None, "same": base, "sees": Candidate(base, keep=("label",)), "other": other, "named": "base"}
    priors = PriorComparison(given, [2.0]).priors
    assert without_copies(priors, model, tell_others=True) == priors and not capsys.readouterr().out
    add_adapter(model.network, Lora(rank=2), model.added)
    found = without_copies(priors, model, tell_others=True)
    said = capsys.readouterr().out.splitlines()
    assert [name for name in found if found[name].prior != priors[name].prior] == ["same"]
    assert [line.split(" MB: ")[-1] for line in said[1:]] == [
        "it sees label (keep)",
        "its weights are not those of the adapter's base",
    ]
    assert all(line.startswith(f"prior {name} is ") for line, name in zip(said, ("same", "sees", "other"), strict=True))
    assert found == without_copies(priors, model) and len(capsys.readouterr().out.splitlines()) == 1
