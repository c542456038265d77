"""Compilation, layout, fused and 8-bit optimisers: the same steps, the same checkpoints, the same comparisons."""

import copy
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from fits import Pictures, same, seed, trainer, tuning, weights
from oracle import pixel_model
from torch import nn

from priorguide.callbacks.comparison import PriorComparison
from priorguide.sample.loop import Sampler
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.videocrafter import VideoCrafter
from priorguide.train.adapters import Lora
from priorguide.train.checkpoint import Checkpoint
from priorguide.train.fine_tune import FineTune
from priorguide.train.step import RunningMean


def compiling(backend, monkeypatch):
    """What `compile` does, with that backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))


def comparison(**priors):
    options = {"num_conditions": 3, "num_pictures": 2, "num_reference": 8, "batch_size": 3}
    return PriorComparison({"self": None, **priors}, [2.0], Sampler(steps=2), every_n_steps=2, **options)


def fit(folder, steps=4, callbacks=(), ckpt_path=None, trained=None, precision="32-true", clip=None, **options):
    seed()
    tune = trained or tuning(**options)
    keep = Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=2, enable_version_counter=False)
    callbacks = [*callbacks, keep]
    run = trainer(
        folder, steps, callbacks=callbacks, enable_checkpointing=True, precision=precision, gradient_clip_val=clip
    )
    run.fit(tune, Pictures(train=12), ckpt_path=ckpt_path)  # whole epochs: its loader resumes at these alone
    return tune


def held(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def near(found, wanted, atol=1e-4):
    """AdamW moves a weight by the learning rate, 1e-3, at every step, whatever the size of its gradient."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol)


WAYS = [
    pytest.param("aot_eager", {"ema_decay": 0.0, "lora": Lora(rank=2)}, id="lora"),  # all but the code generation
    pytest.param("inductor", {}, marks=pytest.mark.slow, id="average"),
    pytest.param("inductor", {"ema_decay": 0.0}, marks=pytest.mark.slow, id="live"),
    pytest.param("inductor", {"ema_decay": 0.0, "lora": Lora(rank=2)}, marks=pytest.mark.slow, id="compiled-lora"),
]


@pytest.mark.parametrize(("backend", "options"), WAYS)
def test_a_compiled_run_is_the_run(tmp_path, monkeypatch, backend, options):
    from torch._dynamo.utils import counters

    compiling(backend, monkeypatch)
    counters.clear()
    priors = {"base": "base" if "lora" in options else pixel_model(7, num_classes=0, image_channels=0)}
    plain = fit(tmp_path / "plain", **options)
    compiled = fit(tmp_path / "compiled", compile=True, **options)
    graphs = counters["stats"]["unique_graphs"]
    near(weights(compiled), weights(plain))
    assert graphs and held(tmp_path / "compiled").keys() == held(tmp_path / "plain").keys()
    assert not any("_orig_mod" in name for name in held(tmp_path / "compiled"))

    compared = fit(tmp_path / "compared", callbacks=[callback := comparison(**priors)], compile=True, **options)
    assert [entry["step"] for entry in callback.history] == [2, 4]
    assert same(weights(compared), weights(compiled))  # bit for bit
    fit(tmp_path / "compared", 2, compile=True, **options)
    resumed = fit(tmp_path / "compared", 4, ckpt_path=tmp_path / "compared" / "last.ckpt", compile=True, **options)
    assert same(weights(resumed), weights(compiled))

    found, wanted = (comparison(**priors).evaluate(tune, Pictures()).pictures for tune in (compiled, plain))
    near(found, wanted)
    assert (found["base", (2.0,)] - found["self", (2.0,)]).abs().max() > 0
    assert counters["stats"]["unique_graphs"] == graphs  # nothing but training was compiled, and that once


def test_a_compiled_network_can_be_copied():
    network = tuning().model.network
    network.compile()
    twin = copy.deepcopy(network)
    assert same(weights(twin), weights(network)) and twin._compiled_call_impl is None


def test_channels_last_changes_the_layout_alone(tmp_path):
    plain, last = fit(tmp_path / "plain"), fit(tmp_path / "last", channels_last=True)
    near(weights(last), weights(plain))
    for network in (last.model.network, last.average):
        kernel = network.mid_block.resnets[0].conv1.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    fit(tmp_path / "halves", 2, channels_last=True)
    resumed = fit(tmp_path / "halves", 4, ckpt_path=tmp_path / "halves" / "last.ckpt", channels_last=True)
    assert same(weights(resumed), weights(last))


def test_channels_last_is_refused_where_no_convolution_gains():
    model, words = DiT.tiny(), "DiTNetwork has no 2-D convolutions to gain from channels_last"
    with pytest.raises(ValueError, match=f"{words} but for the embedding of patches: leave it off"):
        FineTune(model, channels_last=True)
    model.network.x_embedder.proj = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"{words}: leave it off"):
        FineTune(model, channels_last=True)
    for unet in (InstructPix2Pix.tiny(), VideoCrafter.tiny()):
        FineTune(unet, channels_last=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_optimiser_is_fused_and_gradients_are_clipped(tmp_path, precision):
    norms = []

    class Watched(FineTune):
        def on_before_zero_grad(self, optimizer):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    tune = Watched(tuning().model, learning_rate=1e-3)
    fit(tmp_path, trained=tune, precision=precision, clip=1e-3)
    (optimizer,) = tune.trainer.optimizers
    assert all(group["fused"] for group in optimizer.param_groups)
    assert norms and all(norm < 1.01e-3 for norm in norms[1:])


def test_8_bits_hold_the_moments_of_large_tensors_alone(tmp_path):
    tune = fit(tmp_path, use_8bit_adam=True)
    state = tune.trainer.optimizers[0].state
    sizes = {len(p.flatten()) >= 4096: {s["state1"].dtype for q, s in state.items() if q is p} for p in state}
    assert sizes[True] == {torch.uint8} and sizes[False] == {torch.float32}


def test_the_running_mean_moves_as_it_is_written():
    live, mean = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    live[0].bias.requires_grad_(False)
    live[1].running_mean.fill_(3.0)
    before = weights(mean)
    RunningMean(mean, live).move(0.75)
    after = weights(mean)
    torch.testing.assert_close(after["0.weight"], 0.75 * before["0.weight"] + 0.25 * live[0].weight.detach())
    assert same(after["0.bias"], before["0.bias"]) and (after["1.running_mean"] == 3.0).all()


FAULTS = """
import resource, sys, torch
from priorguide.train.step import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
network = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
pixels = torch.rand(4, 16, 128, 128)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(pixels).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(16)][4:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    counts = {}
    for way in ("kept", "given back"):
        run = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        counts[way] = int(run.stdout)
    assert counts["kept"] < counts["given back"] / 4, counts
