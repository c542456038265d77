"""The comparison callback: when it is due, what it leaves behind, and that training does not notice it."""

import copy
import json
import random

import lightning as L
import numpy as np
import pytest
import torch
from fits import Pictures, Seer, same, seed, trainer, tuning, weights
from lightning.pytorch.callbacks import RichProgressBar
from oracle import TwoRungs, assert_near, pixel_model
from PIL import Image

from priorguide.callbacks.comparison import PriorComparison
from priorguide.callbacks.judging import unguided_pictures
from priorguide.callbacks.records import LOGGED
from priorguide.callbacks.shares import Encoded
from priorguide.sample.compare import found_by_trying
from priorguide.sample.loop import Sampler
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.verdict import Rule
from priorguide.train.checkpoint import Checkpoint
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

STEPS = Sampler(steps=3, options={"timestep_spacing": "trailing"})


def base(number: int = 7) -> PixelUNet:
    return pixel_model(number, num_classes=0, image_channels=0)


class Recording(PriorComparison):
    """Keeps every evaluation; if `watchful`, also what the training looked like before and after each."""

    def __init__(self, *args, watchful=False, **options):
        super().__init__(*args, **options)
        self.seen, self.around, self.watchful = [], [], watchful

    def evaluate(self, *args, **options):
        self.seen.append(super().evaluate(*args, **options))
        return self.seen[-1]

    def on_train_batch_end(self, trainer, pl_module, *args):
        before = self.watchful and state(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.watchful:
            self.around.append((before, state(trainer, pl_module)))


def state(trainer, tune) -> dict:
    """Everything that a comparison must leave as it was."""
    return {
        "weights": weights(tune),
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in tune.named_parameters()},
        "optimizer": copy.deepcopy(trainer.optimizers[0].state_dict()),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "modes": {name: module.training for name, module in tune.named_modules()},
        "trained": {name: p.requires_grad for name, p in tune.named_parameters()},
        "hooks": {
            name: [list(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in tune.named_modules()
        },
        "modules": {name: id(module) for name, module in tune.named_modules()},
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default": (torch.get_default_dtype(), torch.get_num_threads()),
    }


def comparison(every: int = 2, **options) -> Recording:
    options = {"priors": {"self": None, "base": base()}, "scales": [3.0], "sampler": STEPS} | options
    sizes = {"num_conditions": 4, "num_pictures": 2, "num_reference": 8, "batch_size": 3}
    return Recording(every_n_steps=every, **{**sizes, **options})


def compare_at_start(tune: FineTune, **options):
    """One evaluation of the model as it is."""
    return comparison(**options).evaluate(tune, Pictures())


# --- non-interference


class Careless(Seer):
    """A metric network that draws from every global generator."""

    def features(self, pixels):
        return super().features(pixels) + torch.rand(1) + np.random.rand() + random.random()


def test_training_does_not_notice_it(tmp_path):
    """With drop-out, a stochastic sampler, clipping, validation and a checkpoint: the same fit, bit for bit."""
    ends = []
    for callback in (None, comparison(metric_network=Careless(), sampler=Sampler(steps=3, eta=1.0), watchful=True)):
        seed()
        tune = tuning(lr_scheduler="cosine", lr_warmup_steps=2)
        options = {"gradient_clip_val": 1.0, "limit_val_batches": 1.0, "val_check_interval": 3}
        fitted = trainer(tmp_path / str(len(ends)), 6, callbacks=[callback] if callback else [], **options)
        fitted.fit(tune, Pictures(train=36))
        end = state(fitted, tune)
        end.pop("modules")
        ends.append(end)
    assert len(callback.seen) == 3 and len(callback.around) == 6
    for name in ends[0]:
        assert same(ends[0][name], ends[1][name]), name
    for before, after in callback.around:
        for name in before:
            assert same(before[name], after[name]), name


def test_priors_are_frozen_and_unchanged(tmp_path):
    prior = base()
    before = weights(prior)
    callback = comparison(priors={"self": None, "base": prior})
    trainer(tmp_path, 2, callbacks=[callback]).fit(tuning(), Pictures())
    assert same(before, weights(prior)) and not prior.training
    assert not any(p.requires_grad or p.grad is not None for p in prior.parameters())


def test_a_comparison_that_fails_leaves_the_model_as_it_was():
    tune, network = tuning(), Seer()
    network.features = lambda pixels: 1 / 0
    training, live = tune.model.network.training, tune.model.network
    with pytest.raises(ZeroDivisionError):
        compare_at_start(tune, metric_network=network)
    assert tune.model.network is live and tune.model.network.training == training


# --- when it is due


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_due_every_n_steps_of_the_optimiser(tmp_path, accumulate):
    callback = comparison(every=2)
    data = Pictures(train=6 * 7 * accumulate)
    trainer(tmp_path, 7, callbacks=[callback], accumulate_grad_batches=accumulate).fit(tuning(), data)
    assert [event["step"] for event in callback.history] == [2, 4, 6]
    assert len(callback.seen) == 3 and callback.skipped == []


def test_a_budget_skips_slots_and_says_so(tmp_path):
    callback = comparison(every=2, max_overhead=1e-9)
    fitted = trainer(tmp_path, 6, callbacks=[callback])
    fitted.fit(tuning(), Pictures(train=36))
    assert [event["step"] for event in callback.history] == [2]  # nothing is spent before the first
    assert callback.skipped == [4, 6] and callback.state_dict()["skipped"] == [4, 6]
    assert fitted.callback_metrics["compare/skipped"] == 2
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [2]
    generous = comparison(every=2, max_overhead=1e9)
    trainer(tmp_path / "2", 6, callbacks=[generous]).fit(tuning(), Pictures(train=36))
    assert len(generous.history) == 3 and generous.skipped == []


@pytest.mark.parametrize("options", [{"every": 0}, {"num_conditions": 0}])
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        comparison(**options)


# --- what is sampled


def test_it_samples_with_the_average(tmp_path):
    callback = comparison(priors={"self": None})
    tune = tuning(learning_rate=1e-2, ema_decay=0.9)
    trainer(tmp_path, 2, callbacks=[callback]).fit(tune, Pictures())
    logged = callback.seen[0].pictures["self", (3.0,)]
    alone = FineTune(copy.deepcopy(tune.model), ema_decay=0)
    live = compare_at_start(alone, priors={"self": None}).pictures["self", (3.0,)]
    alone.model.network.load_state_dict(tune.average.state_dict())
    averaged = compare_at_start(alone, priors={"self": None}).pictures["self", (3.0,)]
    assert torch.equal(logged, averaged) and (logged - live).abs().max() > 1e-3


def test_candidates_and_events_share_noise_and_conditions(tmp_path):
    """Without learning, every event has the same pictures; and a copy of the model as prior those of self."""
    tune = tuning(learning_rate=0.0, ema_decay=0)
    twin = copy.deepcopy(tune.model)
    callback = comparison(priors={"self": None, "twin": twin, "base": base()}, sampler=Sampler(steps=3, eta=1.0))
    trainer(tmp_path, 4, callbacks=[callback]).fit(tune, Pictures())
    first, second = (evaluation.pictures for evaluation in callback.seen)
    assert same(first, second)
    assert_near(first["twin", (3.0,)], first["self", (3.0,)])
    assert (first["base", (3.0,)] - first["self", (3.0,)]).abs().max() > 1e-3
    of_conditions = first["self", (3.0,)]
    assert all(not torch.equal(of_conditions[0], other) for other in of_conditions[1:])


def test_before_training_self_and_base_give_the_same_pictures():
    """New input channels at zero and the base's own null row: the first unconditional predictions are the base's."""
    prior = base()
    model = PixelUNet.from_base(prior, num_classes=3, image_channels=1)
    tune = FineTune(model, drop=[Drop(("image", "label"), 0.1)])
    found = compare_at_start(tune, priors={"self": None, "base": prior}, scales=[1.0, 3.0]).pictures
    assert_near(found["base", (3.0,)], found["self", (3.0,)])
    assert (found["self", (3.0,)] - found["self", (1.0,)]).abs().max() > 1e-3  # though guidance does something
    with torch.no_grad():
        model.network.class_embedding.weight[-1] += 1  # a null branch that has moved
        tune.average.class_embedding.weight[-1] += 1
    found = compare_at_start(tune, priors={"self": None, "base": prior}).pictures
    assert (found["base", (3.0,)] - found["self", (3.0,)]).abs().max() > 1e-3


def test_arms_at_scale_1_are_one():
    names = {"self": None, "base": base(), "other": base(8)}
    evaluation = compare_at_start(tuning(), priors=names, scales=[1.0, 2.0], metric_network=Seer())
    ones = [evaluation.pictures[name, (1.0,)] for name in names]
    assert ones[0] is ones[1] is ones[2]
    assert [(row["prior"], row["scales"]) for row in evaluation.rows()] == [
        ("none", [1.0]), *((name, [2.0]) for name in names)
    ]  # fmt: skip


def test_any_number_of_candidates_over_any_number_of_scales():
    names = {"self": None, **{f"candidate {i}": base(i) for i in range(5)}}
    evaluation = compare_at_start(tuning(), priors=names, scales=[1.5, 2.0, 4.0])
    assert evaluation.pictures.keys() == {(name, (scale,)) for name in names for scale in (1.5, 2.0, 4.0)}
    assert len({tuple(images.flatten().tolist()) for images in evaluation.pictures.values()}) == 18


def test_a_ladder_of_two_takes_pairs_of_scales(tmp_path):
    tune = FineTune(TwoRungs(), drop=[Drop(("text",), 0.1)], ema_decay=0)
    callback = comparison(priors={"self": None, "base": TwoRungs(seed=1)}, scales=[[1.5, 7.5], [1.0, 3.0]])
    callback.check(tune.model)
    assert callback.candidates(tune.model).keys() == {
        (name, scales) for name in ("self", "base") for scales in ((1.5, 7.5), (1.0, 3.0))
    }


def test_metrics_by_arm(tmp_path):
    evaluation = compare_at_start(tuning(), metric_network=Seer(), num_conditions=8, num_reference=12)
    for row in evaluation.rows():
        assert row["metrics"].keys() == {"fd", "kid", "coverage", "psnr", "accuracy"}
    target = Pictures().held_out(8)["pixels"]
    for arm, images in evaluation.pictures.items():
        psnr = -10 * ((images - target) ** 2).mean((1, 2, 3)).log10()
        assert evaluation.metrics[arm]["psnr"].value == pytest.approx(psnr.mean().item(), abs=1e-3)
    without = compare_at_start(tuning(), metric_network=Seer(), has_target=False)
    assert all("psnr" not in row["metrics"] for row in without.rows())
    assert evaluation.verdict is None and not evaluation.costs


def test_the_full_comparison_times_and_decides():
    callback = comparison(metric_network=Seer(), scales=[1.0, 2.0], rule=Rule(decide_by="psnr", guards={}))
    steps = []
    evaluation = callback.evaluate(
        tuning(), Pictures(), full=True, num_conditions=12, on_step=lambda done, total: steps.append((done, total))
    )
    assert evaluation.verdict is not None and evaluation.verdict.prior in ("self", "base")
    assert evaluation.floor.keys() == {"fd", "kid", "coverage"}
    rows = {(row["prior"], *row["scales"]): row for row in evaluation.rows()}
    assert [rows[key]["evaluations"] for key in (("none", 1.0), ("self", 2.0), ("base", 2.0))] == [3, 6, 6]
    assert rows["base", 2.0]["extra_bytes"] > rows["self", 2.0]["extra_bytes"] == 0
    assert all(row["seconds_per_image"] > 0 for row in rows.values())
    assert steps == [(n, 12) for n in range(1, 13)]  # 4 batches of 3 steps


def test_what_priors_draw_alone_does_not_hang_on_the_condition():
    callback, tune, data = comparison(scales=[2.0]), tuning(), Pictures()
    found = unguided_pictures(callback, tune, Encoded(data.held_out(3)), 3)
    data.held_part = {**data.held_part, "image": 1 - data.held_part["image"], "label": 2 - data.held_part["label"]}
    again = unguided_pictures(callback, tune, Encoded(data.held_out(3)), 3)
    assert found.keys() == {"self", "base"} and found["self"].shape == (3, 1, 16, 16)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.allclose(found["self"], found["base"], atol=1e-3)


# --- the batch size


def test_a_batch_size_is_found_where_more_gains_nothing(monkeypatch):
    asked, clock = [], [0.0]

    def run(size):
        asked.append(size)
        clock[0] += 1 + max(size, 8) / 8  # from 8 on a condition costs the same, but for the second per call

    monkeypatch.setattr("priorguide.sample.compare.time.perf_counter", lambda: clock[0])
    assert found_by_trying(run, most=1000) == 64
    assert asked == [1, *(size for n in range(8) for size in (2**n, 2**n))]
    assert found_by_trying(run, most=12) == 12


def test_a_batch_size_is_found_within_memory():
    def run(size):
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert found_by_trying(run, most=64, gain=0) == 4


def test_a_batch_size_that_was_found_is_remembered_with_the_run(tmp_path, monkeypatch):
    tried = []

    def find(run, most):
        run(2)
        tried.append(most)
        return 2

    monkeypatch.setattr("priorguide.callbacks.comparison.found_by_trying", find)
    callback = comparison(every=1, batch_size=None)
    save = Checkpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    options = {"callbacks": [callback, save], "enable_checkpointing": True}
    trainer(tmp_path, 2, **options).fit(tuning(), Pictures())
    assert tried == [4] and callback.sizes == {"cpu, 2 arms": 2}
    again = comparison(every=1, batch_size=None)
    options["callbacks"] = [again, save]
    trainer(tmp_path, 3, **options).fit(tuning(), Pictures(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert tried == [4] and again.sizes == callback.sizes
    fixed = comparison(batch_size=3).evaluate(tuning(), Pictures())
    found = comparison(batch_size=None).evaluate(tuning(), Pictures())
    for arm, pictures in found.pictures.items():
        assert_near(pictures, fixed.pictures[arm], 1e-4)


# --- what it leaves on disk, and in checkpoints


def lines(folder) -> list[str]:
    return (folder / "compare" / "metrics.jsonl").read_text().splitlines()


def test_panels_and_metrics_on_disk(tmp_path):
    callback = comparison(every=2, metric_network=Seer())
    trainer(tmp_path, 4, callbacks=[callback]).fit(tuning(), Pictures())
    names = sorted(path.name for path in (tmp_path / "compare").iterdir())
    assert names == ["metrics.jsonl", "panel-00000002.png", "panel-00000004.png", LOGGED]
    assert [json.loads(line) for line in lines(tmp_path)] == json.loads(json.dumps(callback.history))
    assert [(row["prior"], row["scales"]) for row in callback.history[0]["rows"]] == [("self", [3.0]), ("base", [3.0])]
    with Image.open(tmp_path / "compare" / "panel-00000004.png") as panel:
        colours = np.asarray(panel.convert("L"))
    assert min(panel.size) > 64 and len(np.unique(colours)) > 20  # pictures, not a blank


def test_history_survives_a_checkpoint(tmp_path):
    def fit(steps, **options):
        callback = comparison(every=2, max_overhead=1e-9)
        keep = Checkpoint(dirpath=tmp_path / "checkpoints", save_last=True, enable_version_counter=False)
        fitted = trainer(tmp_path, steps, enable_checkpointing=True, callbacks=[callback, keep])
        fitted.fit(tuning(), Pictures(train=48), **options)
        return callback

    first = fit(4)
    assert [event["step"] for event in first.history] == [2] and first.skipped == [4]
    second = fit(8, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert second.history[0] == first.history[0]
    assert [event["step"] for event in second.history] == [2, 6] and second.skipped == [4, 8]
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [2, 6]


def test_a_run_that_resumes_in_mid_accumulation_does_not_compare_twice(tmp_path):
    keep = Checkpoint(dirpath=tmp_path, save_last=True, enable_version_counter=False)
    first, second = comparison(every=2), comparison(every=2)
    data = Pictures(train=60)
    trainer(tmp_path, 2, enable_checkpointing=True, callbacks=[first, keep]).fit(tuning(), data)
    resumed = trainer(tmp_path, 3, callbacks=[second], accumulate_grad_batches=2)
    resumed.fit(tuning(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == 3
    assert len(first.seen) == 1 and second.seen == []


# --- refusals, before training begins


class Started(L.Callback):
    began = False

    def on_train_start(self, trainer, pl_module):
        self.began = True


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"priors": {"base": pixel_model(picture_channels=3)}}, r"must have the same channels"),
        ({"priors": {"base": pixel_model(resolution=32, fold=4)}}, r"same channels|one latent space"),
        ({"scales": [[1.5, 7.5]]}, r"ladder of 1 rung\(s\) \(image\+label\) and takes as many scales, got 2"),
        ({"interval": (900.0, 100.0)}, r"interval must be \(low, high\)"),
        ({"interval": (0.2, 0.9)}, r"self's interval \[0.2, 0.9\] holds none of the 3 steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, options, sentence):
    started = Started()
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, 2, callbacks=[comparison(**options), started]).fit(tuning(), Pictures())
    assert not started.began and not list(tmp_path.iterdir())


def test_pictures_that_are_not_finite_end_the_run():
    tune = tuning(ema_decay=0)
    with torch.no_grad():
        tune.model.network.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the pictures are no longer finite: lower the learning rate"):
        compare_at_start(tune)


def test_the_progress_bar_says_that_it_compares(tmp_path, monkeypatch):
    seen, evaluate = [], PriorComparison.evaluate

    def watched(self, pl_module, *args, on_step, **options):
        def stepping(done, total):
            on_step(done, total)
            tasks = pl_module.trainer.progress_bar_callback.progress.tasks
            seen.append([(task.description, task.completed, task.total) for task in tasks][-1])

        return evaluate(self, pl_module, *args, on_step=stepping, **options)

    monkeypatch.setattr(PriorComparison, "evaluate", watched)
    bar = RichProgressBar()
    fit = trainer(tmp_path, 2, callbacks=[comparison(), bar], enable_progress_bar=True)
    fit.fit(tuning(), Pictures())
    assert seen[0] == ("comparing at step 2", 1, len(seen)) and seen[-1][1] == len(seen)
    assert not [task for task in bar.progress.tasks if "comparing" in task.description]  # its line goes with it
