"""What only a GPU can show: bf16, compilation, 8-bit moments, and pictures that are those of the CPU.

Bases in few bits and the placing of priors have their tests on both, in `test_adapter_bits` and `test_placement`.
"""

import lightning as L
import pytest
import torch
from fits import Pictures, Seer, same, seed, trainer, tuning, weights
from oracle import pixel_model
from torch.utils.data import DataLoader

from priorguide.callbacks.comparison import PriorComparison
from priorguide.data.labelled import LabelledImages
from priorguide.sample.loop import Sampler
from priorguide.sample.models.dit import DiT
from priorguide.train.adapters import Lora
from priorguide.train.checkpoint import Checkpoint
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

pytestmark = pytest.mark.gpu
DEVICE, ACCELERATOR = "cuda", "gpu"
WAYS = [
    {},
    {"compile": True, "channels_last": True},
    {"use_8bit_adam": True},
    {"gradient_checkpointing": False, "lora": Lora(rank=2)},
    {"lora": Lora(rank=2, base_bits="nf4"), "compile": True},
]


def comparison(base="apart"):
    options = {"num_conditions": 4, "num_pictures": 2, "num_reference": 8, "batch_size": 4, "metric_network": Seer()}
    prior = pixel_model(7, num_classes=0, image_channels=0) if base == "apart" else base
    return PriorComparison({"self": None, "base": prior}, [2.0], Sampler(steps=3), every_n_steps=4, **options)


def fit(folder, steps=8, callbacks=(), ckpt_path=None, precision="bf16-mixed", **options):
    seed()
    tune = tuning(**options)
    keep = Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=4, enable_version_counter=False)
    more = {"callbacks": [*callbacks, keep], "enable_checkpointing": True, "gradient_clip_val": 1.0}
    run = trainer(folder, steps, accelerator=ACCELERATOR, precision=precision, **more)
    run.fit(tune, Pictures(), ckpt_path=ckpt_path)
    return tune


@pytest.mark.parametrize("options", WAYS, ids=lambda options: "-".join(options) or "plain")
def test_a_run_in_bf16_compares_and_resumes(tmp_path, options):
    base = "base" if "lora" in options else "apart"
    tune = fit(tmp_path, callbacks=[callback := comparison(base)], **options)
    assert [entry["step"] for entry in callback.history] == [4, 8]
    assert all(value.isfinite().all() for value in weights(tune).values() if value.is_floating_point())
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name for name in held) and all(v.device.type == DEVICE for v in held.values())
    half = tmp_path / "half"
    fit(half, 4, **options)
    resumed = fit(half, 8, ckpt_path=half / "last.ckpt", **options)
    kept = {name: value for name, value in weights(resumed).items() if name in held}
    for name, value in kept.items():  # kernels that add in any order make it differ by rounding
        torch.testing.assert_close(value, held[name].to(value.device), rtol=0, atol=2e-3)


def test_the_optimiser_is_fused_where_gradients_are_clipped(tmp_path):
    (optimizer,) = fit(tmp_path, 2).trainer.optimizers
    assert all(group["fused"] for group in optimizer.param_groups)


def test_16_bits_with_a_scaled_loss(tmp_path):
    tune = fit(tmp_path, precision="16-mixed", callbacks=[callback := comparison()], max_bad_steps=3)
    assert [entry["step"] for entry in callback.history] == [4, 8] and tune.bad_steps == 0
    assert all(value.isfinite().all() for value in weights(tune).values() if value.is_floating_point())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["MixedPrecision"]["scale"] > 0


class NoWait(L.Callback):
    """Has torch raise an error where a step of training would wait for the device, from the third step on."""

    def on_train_batch_start(self, trainer, *_):
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step > 2 else "default")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options", [{}, {"snr_gamma": 5.0}, {"lora": Lora(rank=2)}], ids=lambda options: "-".join(options)
)
def test_no_step_waits_for_the_device(tmp_path, options):
    run = trainer(
        tmp_path, 6, accelerator=ACCELERATOR, precision="bf16-mixed", callbacks=[NoWait()], gradient_clip_val=1.0,
        log_every_n_steps=50,
    )  # fmt: skip
    run.fit(tuning(**options), Pinned())


def test_no_step_of_a_learned_variance_waits_for_the_device(tmp_path):
    network = DiT.create(input_size=16, num_classes=3, channels=1, width=48, depth=2, num_heads=2, learn_sigma=True)
    run = trainer(tmp_path, 6, accelerator=ACCELERATOR, callbacks=[NoWait()], log_every_n_steps=50)
    run.fit(FineTune(network, [Drop(("label",), 0.1)]), Pinned())


class Pinned(Pictures):
    def train_dataloader(self):
        loader = super().train_dataloader()
        return DataLoader(loader.dataset, self.batch_size, drop_last=True, pin_memory=True)


@pytest.mark.parametrize("options", [{}, {"lora": Lora(rank=2)}], ids=["apart", "lora"])
def test_a_comparisons_pictures_are_those_of_the_cpu(options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    tune = tuning(**options)
    for name, parameter in tune.average.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    base = "base" if options else "apart"
    wanted = comparison(base).evaluate(tune, Pictures()).pictures
    found = comparison(base).evaluate(tune.to(DEVICE), Pictures()).pictures
    for arm in wanted:
        torch.testing.assert_close(found[arm], wanted[arm], rtol=0, atol=1e-3)
    assert (wanted["base", (2.0,)] - wanted["self", (2.0,)]).abs().max() > 1e-2


def test_training_does_not_notice_a_comparison(tmp_path):
    """Bit for bit, as on the CPU: with kernels that add in one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = fit(tmp_path / "plain", precision="32-true")
        compared = fit(tmp_path / "compared", callbacks=[comparison()], precision="32-true")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(plain), weights(compared))


def test_a_comparison_gives_its_memory_back(tmp_path):
    callback, tune = comparison(), tuning().to(DEVICE)
    callback.placement.way = "cpu"
    callback.evaluate(tune, Pictures())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    callback.evaluate(tune, Pictures())
    assert torch.cuda.memory_allocated() == before


def test_batches_wait_in_pinned_memory():
    loader = LabelledImages(transform="edges", resolution=16, max_train_samples=128).train_dataloader()
    assert all(part.is_pinned() for part in next(iter(loader)).values())
