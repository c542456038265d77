"""Compares priors while a model trains, and leaves the training as it found it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ..sample.candidates import Candidate, arms, check_interval
from ..sample.checkpoints import SIGN
from ..sample.compare import compare, found_by_trying, within_memory
from ..sample.evaluate import Drawn, Evaluation, costs_of, drawn_from, to_device
from ..sample.guidance import Arm, Guidance, Prior
from ..sample.loop import Sampler
from ..sample.machine import device_name
from ..sample.metrics import USUAL, check_metrics
from ..sample.model import DiffusionModel
from ..sample.parts import Parts
from ..sample.saturation import Energies
from ..sample.verdict import Rule
from .judging import judged
from .placement import Placement, Where, apart, buffers_to, without_copies
from .records import write_comparison
from .shares import Encoded, check_enough, gather, least, moved, rows, share
from .showing import line
from .together import Together
from .wandb_log import log_comparison


class PriorComparison(L.Callback):
    """Samples with every candidate prior from the same noise and conditions, every so many steps, and logs it.

    Needs a LightningModule with `model` and `averaged()`, and a data module with `held_out(n)` and `reference(n)`, as
    FineTune and LabelledImages have. Pictures and metrics go to the run's folder and to W&B where a WandbLogger is.

    Args:
        priors: name -> model, or a `Candidate` with options of its own; null is the fine-tuned model itself, "base" of
            a LoRA its network with the adapter off, which shares memory and batch with it, as does a model of its base.
        scales: guidance scales of those without their own, numbers or (for longer ladders) lists.
        sampler: scheduler, steps and options.
        every_n_steps: of the optimiser; due exactly then. None leaves it to `priorguide compare RUN --watch`.
        num_conditions: held-out conditions; all ranks share them.
        num_pictures: how many of them are shown.
        num_reference: held-out real pictures, after the conditions', that distances are measured to.
        batch_size: conditions at a time; None finds by trying how many, and remembers it with the run (8 under FSDP).
        seed: the first condition's noise seed; the others count on.
        metric_network: features, and class logits if it has any, of pixels; none leaves those metrics out.
        clip: CLIP's towers, for similarities to texts and pictures.
        perceptual: distances (N,) of pictures to their targets, such as Lpips.
        metrics: what to measure, as far as there is what it takes; what the rule names always is.
        rule: how the full comparison decides.
        interval: (low, high) in t; outside it there is no guidance.
        channels: how many of x_0's first channels are guided, all if absent; DiT's authors guide 3 of 4.
        has_target: each condition asks for the very picture that it comes with, so that PSNR means something.
        max_overhead: the most that comparisons may take, as a share of training time; later slots are then skipped.
        prior_placement: of priors' networks: device, cpu (between comparisons), streamed (layer by layer), which auto
            chooses by the memory at hand; or int8, nf4 on the device while training, with what that changes said. The
            full comparison takes whole ones.
    """

    def __init__(
        self,
        priors: dict[str, DiffusionModel | Candidate | Literal["base"] | None],
        scales: list[float] | list[list[float]],
        sampler: Sampler | None = None,
        every_n_steps: int | None = 1000,
        num_conditions: int = 64,
        num_pictures: int = 16,
        num_reference: int = 1000,
        batch_size: int | None = 64,
        seed: int = 0,
        metric_network: nn.Module | None = None,
        clip: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        metrics: Sequence[str] = USUAL,
        rule: Rule | None = None,
        interval: tuple[float, float] | None = None,
        channels: int | None = None,
        has_target: bool = True,
        max_overhead: float | None = None,
        prior_placement: Where = "auto",
    ):
        if (every_n_steps is not None and every_n_steps < 1) or num_conditions < 1:
            raise ValueError(
                f"every_n_steps and num_conditions must be at least 1, got {every_n_steps} and {num_conditions}"
            )
        if odd := [name for name in priors if SIGN in name]:
            raise ValueError(f"a candidate's name may hold no {SIGN}, which names checkpoints, got {odd[0]!r}")
        self.scales, self.sampler = scales, sampler or Sampler()
        self.priors = {name: _candidate(prior, interval, channels) for name, prior in priors.items()}
        self.every_n_steps, self.num_conditions = every_n_steps, num_conditions
        self.num_pictures = min(num_pictures, num_conditions)
        self.num_reference, self.batch_size, self.seed = num_reference, batch_size, seed
        self.metric_network, self.rule = metric_network, rule or Rule()
        self.clip, self.perceptual = clip, perceptual
        self.metrics = {*metrics, *self.rule.metrics}
        check_metrics(self.metrics)
        self.has_target, self.max_overhead = has_target, max_overhead
        self.placement = Placement(prior_placement)
        self.sizes: dict[str, int] = {}  # batch sizes as they were found, or halved, by device and number of arms
        self._bound: tuple[DiffusionModel, dict[str, Prior | None]] | None = None
        self.history: list[dict[str, Any]] = []
        self.skipped: list[int] = []
        self._last_step, self._resumed = -1, False
        self.seconds = 0.0
        for module in (metric_network, clip, perceptual, *(candidate.prior for candidate in self.priors.values())):
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    # --- when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.priors = without_copies(self.priors, pl_module.model, tell_others=True)  # type: ignore[arg-type]
        self.check(pl_module.model)  # type: ignore[arg-type]
        check_enough(trainer.datamodule, self.num_conditions, self.reference_needed())  # type: ignore[attr-defined]

    def reference_needed(self) -> int:
        return 0 if self.metric_network is None else self.num_reference

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self.seconds = time.perf_counter(), 0.0
        self._last_step = step = trainer.global_step  # a run that resumes has compared there already, unless
        stopped = self._resumed and self._due(step)  # it was stopped before it could
        if stopped and step not in (*self.skipped, *(entry["step"] for entry in self.history)):
            self._compare(trainer, pl_module, step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step == 0 or not self._due(step):
            return  # with accumulation, several micro-batches end at one step of the optimiser
        self._last_step = step
        if self._over_budget(trainer):
            self.skipped.append(step)
            pl_module.log("compare/skipped", float(len(self.skipped)), rank_zero_only=True)
            return
        self._compare(trainer, pl_module, step)

    def _due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _compare(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        start = time.perf_counter()
        data, rank, world = trainer.datamodule, trainer.global_rank, trainer.world_size  # type: ignore[attr-defined]
        with line(trainer, f"comparing at step {step}") as show:
            on_step = Together(trainer, show).on_step
            evaluation = self.evaluate(pl_module, data, rank=rank, world=world, on_step=on_step)
        self.history.append({"step": step, "rows": evaluation.rows()})
        if trainer.is_global_zero:
            batch = self.examples(data, self.num_pictures)
            write_comparison(File(trainer.default_root_dir) / "compare", step, evaluation, batch)
            log_comparison(trainer.loggers, step, evaluation, batch)
        self.seconds += time.perf_counter() - start

    def _over_budget(self, trainer: L.Trainer) -> bool:
        if self.max_overhead is None:
            return False
        training = time.perf_counter() - self._started - self.seconds
        return bool(trainer.strategy.broadcast(self.seconds > self.max_overhead * training))

    # --- what

    def examples(self, data: Any, n: int) -> dict[str, Any]:
        """The first n held-out conditions, to show; with their "pixels" where these are what is asked for."""
        batch = dict(data.held_out(n))
        return batch if self.has_target else {name: part for name, part in batch.items() if name != "pixels"}

    def candidates(self, model: DiffusionModel, scales: Sequence[Any] | None = None) -> dict[Arm, Guidance]:
        """Every prior at every scale, bound onto the model. ValueError for a base that does not fit."""
        return arms(self.priors, self._bind(model), scales or self.scales, override=scales is not None)

    def _bind(self, model: DiffusionModel) -> dict[str, Prior | None]:
        """The candidates' priors on this model; bound once, since that may read a checkpoint, or warn, but for those of
        the network that is in the model's place at the time."""
        own = {name: candidate.bind(model) for name, candidate in self.priors.items() if candidate.prior == "base"}
        if self._bound is None or self._bound[0] is not model:
            others = {name: candidate.bind(model) for name, candidate in self.priors.items() if name not in own}
            self._bound = model, others
        bound = own | self._bound[1]
        return {name: bound[name] for name in self.priors}

    def check(self, model: DiffusionModel) -> None:
        """ValueError unless every candidate fits the model and the sampler's steps, and the scales its ladder."""
        for (name, _), guidance in self.candidates(model).items():
            guidance.check(model)
            check_interval(name, guidance, self.sampler, model)

    def evaluate(
        self,
        pl_module: L.LightningModule,
        data: Any,
        *,
        rank: int = 0,
        world: int = 1,
        scales: Sequence[Any] | None = None,
        num_conditions: int | None = None,
        full: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Samples and measures every arm, each rank its share of the conditions; if `full`, times them and decides."""
        n = num_conditions or self.num_conditions
        drawn = self.draw(pl_module, data, n, rank=rank, world=world, scales=scales, full=full, on_step=on_step)
        return judged(self, drawn, data, pl_module.device, self.rule if full else None)

    def draw(
        self,
        pl_module: L.LightningModule,
        data: Any,
        n: int,
        *,
        rank: int = 0,
        world: int = 1,
        scales: Sequence[Any] | None = None,
        full: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        parts: Parts | None = None,
        encoded: Encoded | None = None,
    ) -> Drawn:
        """The pictures of every arm on n held-out conditions, or as `encoded`; if `full`, with energies and costs."""
        check_enough(data, n, self.reference_needed())
        device = pl_module.device
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.no_grad())
            model = stack.enter_context(pl_module.averaged())  # type: ignore[operator]
            candidates = self.candidates(model, scales)
            stack.enter_context(self.on_device(device, whole=full, quiet=rank > 0))
            batch, mine = data.held_out(n), share(n, rank, world)
            held = encoded or Encoded({name: rows(value, mine) for name, value in batch.items()})
            condition, watch = partial(held.condition, model, device=device), Energies()
            seeds, each = [self.seed + int(i) for i in mine], len(mine)
            if self.placement.few_bits and not full:
                few, x_0 = to_device(condition(min(4, each), 4), device), held.x_0(model, min(4, each), 4, device)
                candidates = self.placement.in_few_bits(candidates, model, x_0.to(device), few, quiet=rank > 0)
            key = f"{device_name(device)}, {len(candidates)} arms"
            if parts is not None:
                parts.open(drawn_from(model, candidates, batch, seeds, self.sampler, device))
                self.sizes |= {key: parts.batch_size} if parts.batch_size else {}
            how: dict[str, Any] = {"on_step": on_step, "watch": watch if full else None, "parts": parts}

            def sample(size: int) -> dict[Arm, Tensor]:
                return compare(model, condition(each, size), seeds, candidates, self.sampler, batch_size=size, **how)

            def try_out(size: int) -> None:
                quick = replace(self.sampler, steps=min(2, self.sampler.steps))
                compare(model, condition(size, size), seeds[:size], candidates, quick, batch_size=size)

            size = self.sizes.get(key, self.batch_size)
            if size is None:  # processes that share a network's weights ask it equally often, and must not try
                sharing = getattr(pl_module, "device_mesh", None) is not None
                size = 8 if sharing else least(pl_module, found_by_trying(try_out, each), world)
            together = Together(pl_module.trainer) if world > 1 else None
            with together.until_all_are_done() if together else nullcontext():
                tried = together.trying(sample, model.network) if together else sample
                pictures, self.sizes[key] = within_memory(tried, size)
            if world > 1:
                pictures = gather(pl_module, pictures, n, world)
            if not all(images.isfinite().all() for images in pictures.values()):
                raise ValueError("the pictures are no longer finite: lower the learning rate, or clip gradients")
            costs = costs_of(model, condition(each, 1), candidates, self.sampler, self.sizes[key]) if full else {}
            return Drawn(pictures, watch.means(), costs)

    @contextmanager
    def on_device(self, device: torch.device, whole: bool = True, quiet: bool = True) -> Iterator[None]:
        """Priors and metric network on the device, and back; the priors' networks as `Placement.placed` has it."""
        models = [c.prior for c in self.priors.values() if isinstance(c.prior, DiffusionModel)]
        guests = [m for m in (self.metric_network, self.clip, self.perceptual) if m is not None]
        guests += [module for model in models for name, module in model.named_children() if name != "network"]
        for model in models:
            buffers_to(model, device)
        priors = apart(self._bound[1] if self._bound else {})
        with moved(guests, device), self.placement.placed(priors, device, whole, quiet):
            yield

    # --- resume

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "skipped": self.skipped, "batch_sizes": {} if self.batch_size else self.sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.skipped, self._resumed = state_dict["history"], state_dict["skipped"], True
        self.sizes |= {} if self.batch_size else state_dict.get("batch_sizes", {})


def _candidate(
    prior: DiffusionModel | Candidate | Literal["base"] | None,
    interval: tuple[float, float] | None,
    channels: int | None,
) -> Candidate:
    """A candidate with the comparison's options where it has none of its own."""
    own = prior if isinstance(prior, Candidate) else Candidate(prior)
    return replace(own, interval=own.interval or interval, channels=own.channels or channels)
