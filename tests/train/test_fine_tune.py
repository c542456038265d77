"""The Lightning module: the objective, what moves and what does not, the average, schedules, checkpoints."""

import copy
import math

import lightning as L
import pytest
import torch
from fits import CLASSES, Pictures, pictures, same, seed, trainer, tuning, weights
from oracle import Mixture, pixel_model
from torch import nn

from priorguide.sample.models.dit import DiT
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.noise import DiscretePath, FlowPath, add_noise
from priorguide.train.checkpoint import Checkpoint
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop


class Watch(L.Callback):
    """The live weights, their average, the learning rates and the loss, after every micro-batch."""

    def __init__(self):
        self.live, self.mean, self.rates, self.losses = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live.append(weights(pl_module.model.network))
        self.mean.append(weights(pl_module.average) if pl_module.average is not None else None)
        self.losses.append(outputs["loss"].item())


class Framed(PixelUNet):
    """A pixel model with a frozen encoder of its image, which has running statistics."""

    def __init__(self, network, *args, **options):
        super().__init__(network, *args, **options)
        self.encoder = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))

    def encode_condition(self, batch):
        parts = super().encode_condition(batch)
        return {**parts, "image": self.encoder(parts["image"])}


def framed() -> Framed:
    tiny = pixel_model()
    return Framed(tiny.network, **tiny.config())


# --- the objective


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("path", [DiscretePath.cosine(), FlowPath()], ids=["cosine", "flow"])
def test_the_loss_of_the_true_target_is_zero(prediction, path):
    """All data is one point: there the exact prediction is the target itself."""
    model = Mixture(means=[(0.5, -1.0)], stds=(0.0,), shares=(1.0,), path=path, prediction=prediction)
    tune = FineTune(model, ema_decay=0)
    t = torch.tensor([20.0, 300.0, 600.0, 900.0])
    eps = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    condition = {"label": torch.zeros(4, dtype=torch.long)}
    x_0 = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1).expand(4, -1, -1, -1)
    assert tune.loss(x_0, condition, eps, t).max() < 1e-6
    assert tune.loss(x_0 + 0.5, condition, eps, t).min() > 1e-6  # and of other data it is not


def test_the_loss_is_the_squared_distance_to_v_by_hand():
    tune = tuning()
    x_0, condition = tune.model.encode(pictures(4))
    eps, t = torch.randn_like(x_0), torch.tensor([10, 400, 700, 990])
    alpha, sigma = (c.float().reshape(4, 1, 1, 1) for c in tune.model.path.coefficients(t))
    with torch.no_grad():
        out = tune.model.denoise(alpha * x_0 + sigma * eps, t, condition)
        expected = ((out - (alpha * eps - sigma * x_0)) ** 2).mean((1, 2, 3))
        torch.testing.assert_close(tune.loss(x_0, condition, eps, t), expected)
        tune.snr_gamma = 5.0
        snr = (alpha / sigma).flatten() ** 2
        torch.testing.assert_close(tune.loss(x_0, condition, eps, t), expected * snr.clamp(max=5) / (snr + 1))


def test_a_learned_variance_adds_the_bound():
    """Only the variance's half of the output is moved by it, and with a weight of 0 it is not there."""
    seed()
    tune = FineTune(DiT.tiny(), ema_decay=0)
    network, condition = tune.model.network, {"label": torch.tensor([0, 1, 2, 3])}
    x_0, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 500, 999])
    losses, gradients = {}, {}
    for weight in (0.0, 1.0, 2.0):
        tune.vb_weight = weight
        losses[weight] = tune.loss(x_0, condition, eps, t)
        (gradient,) = torch.autograd.grad(losses[weight].sum(), network.final_layer.linear.weight)
        gradients[weight] = gradient.unflatten(0, (4, 2))  # (patch, (prediction, variance), width)
    alpha, sigma = tune.model.path.coefficients(t)
    out = tune.model.denoise(add_noise(x_0, eps, alpha, sigma), t, condition)
    torch.testing.assert_close(losses[0.0], (out - eps).square().mean((1, 2, 3)))
    bound = losses[1.0] - losses[0.0]
    assert bound.min() > 0
    torch.testing.assert_close(losses[2.0] - losses[0.0], 2 * bound)
    torch.testing.assert_close(gradients[1.0][:, 0], gradients[0.0][:, 0])
    assert gradients[0.0][:, 1].abs().max() == 0 and gradients[1.0][:, 1].abs().min() > 0
    model = DiT.tiny()
    model.path = FlowPath()
    with pytest.raises(ValueError, match="on a discrete path alone, got FlowPath: set vb_weight to 0"):
        FineTune(model)
    FineTune(model, vb_weight=0, ema_decay=0)


def fresh_pixel_model():
    base = pixel_model(num_classes=0, image_channels=0)
    return PixelUNet.from_base(base, num_classes=CLASSES, image_channels=1, row_std=0.01)


def fresh_dit():
    """With a learned variance, from an unconditional one."""
    base = DiT.create(4, channels=1, width=48, depth=2, num_heads=2, learn_sigma=True)
    base.network.initialise(zero_std=0.02)
    return DiT.from_base(base, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("make", "side", "steps", "rate"), [(fresh_pixel_model, 16, 120, 2e-3), (fresh_dit, 4, 200, 4e-3)]
)
def test_overfitting_one_batch_parts_condition_and_null(tmp_path, make, side, steps, rate):
    seed()
    data, model = Pictures(train=6, batch_size=6), make()
    for part in (data.train_part, data.held_part):
        part["pixels"] = part["pixels"][..., :: 16 // side, :: 16 // side]
    parts = tuple(sorted(model.ladder[-1]))
    tune = FineTune(model, drop=[Drop(parts, 1 / 3)], learning_rate=rate, ema_decay=0.95)
    x_0, condition = model.encode(data.train_part)
    null = model.null(condition)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn((8, *x_0.shape), generator=generator)
    t = torch.randint(300, 1000, (8, len(x_0)), generator=generator)

    @torch.no_grad()
    def measure() -> list[float]:
        """Losses with the condition and with its null, and how far the predictions are apart, on fixed noise."""
        rows = []
        with tune.averaged() as model:
            for noise, times in zip(eps, t, strict=True):
                alpha, sigma = (c.float().reshape(-1, 1, 1, 1) for c in model.path.coefficients(times))
                x_t = alpha * x_0 + sigma * noise
                apart = model.denoise(x_t, times, condition) - model.denoise(x_t, times, null)
                losses = [tune.loss(x_0, part, noise, times).mean() for part in (condition, null)]
                rows.append([*losses, apart.square().mean()])
        return torch.tensor(rows).mean(0).tolist()

    conditional, unconditional, apart = measure()
    assert conditional == pytest.approx(unconditional, rel=0.01)
    trainer(tmp_path, steps, gradient_clip_val=1.0).fit(tune, data)
    after = measure()
    assert after[0] < 0.25 * conditional
    assert after[0] < 0.75 * after[1]  # the condition is used
    assert after[2] > 20 * apart


def test_drop_out_reaches_the_network(tmp_path):
    seen = []

    class Listening(PixelUNet):
        def denoise(self, x_t, t, condition):
            seen.append(condition)
            return super().denoise(x_t, t, condition)

    tiny = pixel_model()
    seed(1)
    tune = FineTune(Listening(tiny.network, **tiny.config()), drop=[Drop(("label", "image"), 0.5)], ema_decay=0)
    trainer(tmp_path, 8).fit(tune, Pictures(train=48))
    label, image = (torch.cat([condition[name] for condition in seen]) for name in ("label", "image"))
    lost = label == CLASSES
    assert torch.equal(lost, (image == 0).flatten(1).all(1))  # both or neither
    assert 12 <= lost.sum() <= 36  # of 48


# --- what moves


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_only_the_network_moves(tmp_path, decay):
    seed()
    model = framed()
    tune = FineTune(model, drop=[Drop(("image",), 0.5)], learning_rate=1e-3, ema_decay=decay)
    before, frozen = weights(model.network), weights(model.encoder)
    trainer(tmp_path, 3).fit(tune, Pictures())
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.network.named_parameters())
    assert same(frozen, weights(model.encoder))  # its running statistics, too: it stayed in eval mode
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    optimised = {id(p) for group in tune.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.network.parameters()}


def test_frozen_parts_stay_in_eval_mode():
    tune = FineTune(framed(), ema_decay=0.9)
    for mode in (False, True):
        tune.train(mode)
        assert all(module.training == mode for module in tune.model.network.modules())
        assert not any(module.training for part in (tune.model.encoder, tune.average) for module in part.modules())


# --- the average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_the_one_by_hand(tmp_path, accumulate):
    """decay min(0.7, (1 + n) / (10 + n)) at the n-th step of the optimiser, whatever the micro-batches."""
    seed()
    tune, watch = tuning(ema_decay=0.7), Watch()
    mean = weights(tune.model.network)
    fitted = trainer(tmp_path, 6, accumulate_grad_batches=accumulate, callbacks=[watch])
    fitted.fit(tune, Pictures(train=36))
    assert len(watch.live) == 6 * accumulate and fitted.global_step == 6
    for micro, live in enumerate(watch.live, 1):
        if micro % accumulate == 0:
            n = micro // accumulate
            decay = min(0.7, (1 + n) / (10 + n))
            mean = {name: decay * mean[name] + (1 - decay) * live[name] for name in mean}
        # callbacks, the comparison and the checkpoint among them, find the average already moved
        torch.testing.assert_close(watch.mean[micro - 1], mean, rtol=1e-5, atol=1e-6)
    assert not same(watch.mean[-1], watch.live[-1])


def test_averaged_swaps_the_network_and_leaves_everything_as_it_was():
    tune = tuning()
    tune.average.load_state_dict({name: tensor + 1 for name, tensor in tune.average.state_dict().items()})
    tune.model.network.mid_block.eval()  # a mixed state
    network, before = tune.model.network, weights(tune)
    modes = {name: module.training for name, module in tune.named_modules()}
    with tune.averaged() as model:
        assert model is tune.model and model.network is tune.average
        assert not any(module.training for module in model.network.modules())
    with pytest.raises(RuntimeError, match="inside"), tune.averaged():
        raise RuntimeError("inside")
    assert tune.model.network is network and same(before, weights(tune))
    assert {name: module.training for name, module in tune.named_modules()} == modes


def test_without_an_average_the_network_itself_is_used_in_eval_mode():
    tune = tuning(ema_decay=0)
    assert tune.average is None
    with tune.averaged() as model:
        assert model.network is tune.model.network and not model.network.training
    assert tune.model.network.training


# --- optimisers, schedules, precision


def test_fused_adamw_with_groups(tmp_path):
    tune = tuning(lr_multipliers={"class_embedding": 10, "conv_in": 0.5}, weight_decay=0.03, betas=(0.8, 0.95))
    trainer(tmp_path, 1).fit(tune, Pictures())
    optimizer = tune.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    names = {id(parameter): name for name, parameter in tune.model.network.named_parameters()}
    groups = {group["initial_lr"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups.keys() == {1e-2, 1e-3, 5e-4}
    assert groups[1e-2] == {"class_embedding.weight"} and groups[5e-4] == {"conv_in.weight", "conv_in.bias"}
    assert set.union(*groups.values()) == set(names.values())
    assert all(group["weight_decay"] == 0.03 and group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)


def test_8_bit_adamw(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    seed()
    tune = tuning(use_8bit_adam=True)
    before = weights(tune.model.network)
    trainer(tmp_path, 2).fit(tune, Pictures())
    optimizer = tune.trainer.optimizers[0]
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert {state["state1"].dtype for state in optimizer.state.values()} >= {torch.uint8}
    after = weights(tune.model.network)
    assert all(torch.isfinite(tensor).all() for tensor in after.values()) and not same(before, after)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warm_up_and_cosine_count_optimiser_steps(tmp_path, accumulate):
    watch = Watch()
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "lr_multipliers": {"class_embedding": 10}}
    fitted = trainer(tmp_path, 9, callbacks=[watch], accumulate_grad_batches=accumulate)
    fitted.fit(tuning(**options), Pictures(train=6 * 9 * accumulate))
    rates = watch.rates[::accumulate]
    shares = [n / 3 if n < 3 else (1 + math.cos(math.pi * (n - 3) / 6)) / 2 for n in range(9)]
    assert [plain for plain, _ in rates] == pytest.approx([1e-3 * share for share in shares])
    assert [rows for _, rows in rates] == pytest.approx([1e-2 * share for share in shares])


def test_warm_up_and_constant(tmp_path):
    watch = Watch()
    trainer(tmp_path, 5, callbacks=[watch]).fit(tuning(lr_warmup_steps=2), Pictures(train=36))
    assert [rate for (rate,) in watch.rates] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3])


def test_bf16_mixed_precision_on_a_cpu(tmp_path):
    seed()
    tune, watch = tuning(), Watch()
    trainer(tmp_path, 3, precision="bf16-mixed", callbacks=[watch], gradient_clip_val=1.0).fit(tune, Pictures())
    assert all(map(math.isfinite, watch.losses)) and not same(watch.live[0], watch.live[-1])
    assert {tensor.dtype for tensor in (*tune.model.network.parameters(), *tune.average.parameters())} == {
        torch.float32
    }


def test_a_loss_that_is_no_longer_finite_ends_the_run(tmp_path):
    seed()
    with pytest.raises(ValueError, match=r"the loss is no longer finite at step \d: lower the learning rate"):
        trainer(tmp_path, 20).fit(tuning(learning_rate=1e20), Pictures())


# --- validation


def test_validation_uses_the_same_noise_every_time(tmp_path):
    tune, data = tuning(), Pictures(held=12)
    found = []
    for number in (1, 2):
        seed(number)
        before = torch.get_rng_state()
        found += trainer(tmp_path, 1, limit_val_batches=1.0).validate(tune, data, verbose=False)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] and found[0].keys() == {"val/loss", "val/loss_null"}
    assert found[0]["val/loss"] != found[0]["val/loss_null"]
    tune.table = []
    (without,) = trainer(tmp_path, 1, limit_val_batches=1.0).validate(tune, data, verbose=False)
    assert without == {"val/loss": found[0]["val/loss"]}  # nothing is dropped, so no null is trained


def test_validation_sees_condition_and_null_apart_through_the_average(tmp_path):
    tune, data = tuning(), Pictures(held=12)
    with torch.no_grad():  # a label now matters to the average alone
        tune.average.class_embedding.weight[:CLASSES] += 3
    (found,) = trainer(tmp_path, 1, limit_val_batches=1.0).validate(tune, data, verbose=False)
    plain = copy.deepcopy(tune)
    plain.average.load_state_dict(plain.model.network.state_dict())
    (live,) = trainer(tmp_path, 1, limit_val_batches=1.0).validate(plain, data, verbose=False)
    assert found["val/loss"] != live["val/loss"] and found["val/loss_null"] == live["val/loss_null"]


def test_validation_in_the_midst_of_training_changes_nothing(tmp_path):
    ends = []
    for batches in (0, 1.0):
        seed()
        tune, watch = tuning(), Watch()
        fitted = trainer(tmp_path, 4, limit_val_batches=batches, val_check_interval=2, callbacks=[watch])
        fitted.fit(tune, Pictures())
        assert ("val/loss" in fitted.callback_metrics) == bool(batches)
        ends.append((watch.losses, weights(tune), fitted.optimizers[0].state_dict(), torch.get_rng_state()))
    assert same(*ends)


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the tuned module, its checkpoint's file) of a model with a frozen part, after 3 steps."""
    folder = tmp_path_factory.mktemp("fit")
    seed()
    tune = FineTune(framed(), drop=[Drop(("image",), 0.5)], learning_rate=1e-3, ema_decay=0.9)
    keep = Checkpoint(dirpath=folder, every_n_train_steps=2, save_last=True, enable_version_counter=False)
    trainer(folder, 3, enable_checkpointing=True, callbacks=[keep]).fit(tune, Pictures())
    return tune, folder / "last.ckpt"


def test_a_checkpoint_holds_the_network_and_its_average_alone(checkpoint):
    tune, file = checkpoint
    held = torch.load(file, weights_only=True)
    assert held["global_step"] == 3  # though a save was due every 2 steps
    expected = {f"model.network.{name}": tensor for name, tensor in tune.model.network.state_dict().items()}
    expected |= {f"average.{name}": tensor for name, tensor in tune.average.state_dict().items()}
    assert same(dict(held["state_dict"]), expected)
    assert any(name.startswith("model.encoder.") for name in tune.state_dict())  # and that is not in there


def test_a_checkpoint_resumes(checkpoint, tmp_path):
    tune, file = checkpoint
    again = FineTune(framed(), drop=[Drop(("image",), 0.5)], learning_rate=1e-3, ema_decay=0.9)
    assert not same(weights(again), weights(tune))
    watch = Watch()
    fitted = trainer(tmp_path, 5, callbacks=[watch], accumulate_grad_batches=3)  # the 4th batch begins a new one
    fitted.fit(again, Pictures(train=48), ckpt_path=file, weights_only=True)
    assert fitted.global_step == 5
    assert same(watch.live[0], weights(tune.model.network))  # so nothing has moved yet,
    assert same(watch.mean[0], weights(tune.average))  # nor has the average
    assert not same(watch.live[-1], watch.live[0]) and not same(watch.mean[-1], watch.mean[0])


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    tune, file = checkpoint
    held = torch.load(file, weights_only=True)
    name = next(iter(held["state_dict"]))
    tensor = held["state_dict"].pop(name)
    with pytest.raises(ValueError, match=f"the checkpoint lacks 1 of the network's tensors, {name} for one"):
        tune.on_load_checkpoint(held)
    held["state_dict"] |= {name: tensor, "model.network.more": tensor}
    with pytest.raises(ValueError, match=r"holds 1 tensors that the model has not, model\.network\.more for one"):
        tune.on_load_checkpoint(held)


def test_a_checkpoint_cut_short_is_refused(checkpoint, tmp_path):
    tune, file = checkpoint
    content = file.read_bytes()
    keep = Checkpoint(dirpath=tmp_path)
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (cut := tmp_path / "cut.ckpt").write_bytes(content[:size])
        fitted = trainer(tmp_path, 5, enable_checkpointing=True, callbacks=[keep])
        with pytest.raises(ValueError, match=r"cut\.ckpt is not a whole checkpoint"):
            fitted.fit(copy.deepcopy(tune), Pictures(), ckpt_path=cut, weights_only=True)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(checkpoint, monkeypatch, tmp_path, where):
    tune, _ = checkpoint
    again = FineTune(framed(), drop=[Drop(("image",), 0.5)], learning_rate=1e-3, ema_decay=0.9)
    folder = tmp_path / "checkpoints"
    keep = Checkpoint(dirpath=folder, every_n_train_steps=1, save_last=True, enable_version_counter=False)

    class Full(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                self.good = (folder / "last.ckpt").read_bytes()

                def fail(*args):
                    raise OSError(28, "No space left on device")

                monkeypatch.setattr(f"priorguide.train.checkpoint.os.{where}", fail)

    full = Full()
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\); earlier checkpoints"):
        trainer(tmp_path, 4, enable_checkpointing=True, callbacks=[full, keep]).fit(again, Pictures())
    assert (folder / "last.ckpt").read_bytes() == full.good
    assert sorted(file.name for file in folder.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


# --- refusals


def test_data_with_more_classes_than_the_model_is_refused(tmp_path):
    data = Pictures()
    data.num_classes = CLASSES + 1
    with pytest.raises(ValueError, match=r"the data has 4 classes, the model takes labels in \[0, 3\)"):
        trainer(tmp_path, 1).fit(tuning(), data)


def test_labels_outside_the_range_are_refused(tmp_path):
    data = Pictures()
    data.train_part["label"][-1] = CLASSES
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), found 0 to 3"):
        trainer(tmp_path, 4).fit(tuning(), data)


def test_a_drop_table_of_other_parts_is_refused():
    with pytest.raises(ValueError, match=r"drop-out names \['text'\]"):
        tuning(drop=[Drop(("text",), 0.1)])
