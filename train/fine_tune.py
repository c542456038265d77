"""Fine-tuning as a Lightning module: drop-out, a noisy x_t, the prediction's own target, a weighted square."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from ..sample.bits import in_few_bits
from ..sample.checkpoint import read_checkpoint
from ..sample.machine import compile_network
from ..sample.model import Condition, DiffusionModel
from ..sample.noise import DiscretePath, add_noise, data_scale, like, weights
from .adapters import Lora, add_adapter
from .bad_steps import Usual, check_loss, check_network, leave_out_if_bad
from .caching import Encoders, fill
from .combinations import check_combination, check_data
from .objective import (
    Density,
    Drop,
    check_table,
    draw_uniform,
    drop,
    min_snr_weight,
    random_state,
    set_random_state,
    variational_bound,
)
from .sharding import shard
from .step import RunningMean, adamw, to_channels_last, uncompiled


class FineTune(L.LightningModule):
    """Fine-tunes a conditional diffusion model with condition drop-out.

    Args:
        model: the model to train; only its network changes.
        drop: disjoint drop-out events in order, e.g. [{parts: [label], probability: 0.1}]; see `objective.drop`.
        learning_rate: of AdamW, at its peak.
        lr_multipliers: factors for parameters whose name contains the key, e.g. {class_embedding: 10}.
        weight_decay, betas: of AdamW.
        use_8bit_adam: bitsandbytes' AdamW8bit in place of torch's fused AdamW.
        lr_scheduler: constant, or cosine down to zero over the run.
        lr_warmup_steps: of linear warm-up.
        snr_gamma: min-SNR weighting with this gamma; plain squared error if absent.
        vb_weight: of the variational bound's term, by which a learned variance is trained, beside the squared error
            (Nichol & Dhariwal 2021, arXiv 2102.09672, sec. 3.1, where it is 0.001 T); 0 leaves the variance untrained.
        density: of the training times: uniform on the path, logit_normal or mode.
        ema_decay: of the averaged network that validation, comparison and export use; 0 keeps none.
        lora: trains a low-rank adapter, and in full only what the base does not have, in place of the whole network.
        gradient_checkpointing: recomputes activations in the backward pass: less memory, more time.
        compile: torch.compile of the network in training; validation and comparisons run it as written.
        channels_last: the layout that convolutions on GPUs are quickest in; refused for transformers, which have none.
        max_bad_steps: how many steps whose gradient is not finite, or far too long, may be left out over the run, each
            written to the run's bad_steps.jsonl; every step then waits for the device once. At 0, the loss is looked at
            where it is logged, and ends the run.
        max_gradient_growth: a gradient that is so many times as long as usual is far too long.
    """

    def __init__(
        self,
        model: DiffusionModel,
        drop: list[Drop] | None = None,
        learning_rate: float = 1e-4,
        lr_multipliers: dict[str, float] | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        use_8bit_adam: bool = False,
        lr_scheduler: Literal["constant", "cosine"] = "constant",
        lr_warmup_steps: int = 0,
        snr_gamma: float | None = None,
        vb_weight: float = 1.0,
        density: Density = "uniform",
        ema_decay: float = 0.9999,
        lora: Lora | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        max_bad_steps: int = 0,
        max_gradient_growth: float = 100.0,
    ):
        super().__init__()
        if hasattr(model.network, "_orig_mod"):
            raise ValueError(
                "torch.compile has renamed the network's tensors: give the model its network, and set compile"
            )
        self.table = list(drop or [])
        check_table(self.table, model.ladder[-1] if model.ladder else frozenset())
        if model.learned_range and vb_weight and not isinstance(model.path, DiscretePath):
            kind = type(model.path).__name__
            raise ValueError(f"a learned variance is trained on a discrete path alone, got {kind}: set vb_weight to 0")
        self.model = model
        model.requires_grad_(False)
        if lora is None:
            model.network.requires_grad_(True)
        else:
            add_adapter(model.network, lora, model.added)
        self.lora, self.compile_network = lora, compile
        if channels_last:
            to_channels_last(model.network)
        # What the average shares: layers in fewer bits as a whole, since these keep more than parameters.
        frozen: dict[int, Any] = {id(p): p for p in model.network.parameters() if not p.requires_grad}
        frozen |= {id(layer): layer for _, layer in in_few_bits(model.network)}
        self.average = copy.deepcopy(model.network, frozen).requires_grad_(False) if ema_decay else None
        if gradient_checkpointing:
            if not getattr(model.network, "_supports_gradient_checkpointing", False):
                raise ValueError(f"{type(model.network).__name__} has no gradient checkpointing: leave it off")
            model.network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.max_bad_steps, self.bad_steps = max_bad_steps, 0
        self._mean: RunningMean | None = None
        self.max_gradient_growth, self.usual = max_gradient_growth, Usual()
        self.encoders: Encoders | None = None  # off the model while it trains on encoded samples
        self.random: dict[str, Tensor] | None = None  # this process's generators, as the last training step left them
        self.learning_rate, self.lr_multipliers = learning_rate, lr_multipliers or {}
        self.weight_decay, self.betas, self.use_8bit_adam = weight_decay, betas, use_8bit_adam
        self.lr_scheduler, self.lr_warmup_steps = lr_scheduler, lr_warmup_steps
        self.snr_gamma, self.vb_weight, self.density, self.ema_decay = snr_gamma, vb_weight, density, ema_decay
        self.strict_loading = False  # checkpoints hold no frozen network; `on_load_checkpoint` checks the rest
        self.train()

    def train(self, mode: bool = True) -> "FineTune":
        """The average stays in eval mode, and so does all of the model but its network."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def setup(self, stage: str) -> None:
        """Fills the data's cache, if it has one. ValueError where settings do not go together, or the data are not
        what the model takes."""
        shared = isinstance(self.trainer.strategy, ModelParallelStrategy)
        few_bits = self.lora is not None and self.lora.base_bits is not None
        check_combination(str(self.trainer.precision), shared, self.use_8bit_adam, few_bits, self.compile_network)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.encoders is None:  # which tell what sizes the model takes
            check_data(self.model, data)
        if stage == "fit" and getattr(data, "cache", None) is not None:
            self.encoders = self.encoders or Encoders(self.model)
            fill(self, data, self.encoders)
        if self.compile_network and stage == "fit":
            compile_network(self.model.network, len(data.sizes) if getattr(data, "buckets", None) else 0)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, shards the network and its average over all processes."""
        if self.device_mesh is not None:
            shard([network for network in (self.model.network, self.average) if network], self.device_mesh)

    # --- the objective

    def loss(self, x_0: Tensor, condition: Condition, eps: Tensor, t: Tensor) -> Tensor:
        """The weighted squared error (B,) of the prediction at x_t, t (B,), from x_0 and eps (B, *shape); of a model
        with a learned variance, plus the variational bound."""
        alpha, sigma = self.model.path.coefficients(t)
        a, b = weights(self.model.prediction, alpha, sigma)
        x_0 = like(data_scale(self.model.path, t), x_0) * x_0
        target = like(a, x_0) * x_0 + like(b, x_0) * eps
        x_t = add_noise(x_0, eps, alpha, sigma)
        out, v = self.model.denoise_with_variance(x_t, t, condition)
        error = (out.float() - target.float()).square().flatten(1).mean(1)
        if self.snr_gamma is not None:
            error = error * min_snr_weight(self.model.prediction, alpha, sigma, self.snr_gamma).to(error)
        if v is None or not self.vb_weight:
            return error
        assert isinstance(self.model.path, DiscretePath)
        bound = variational_bound(self.model.path, self.model.prediction, out.float(), v.float(), x_0, x_t, t)
        return error + self.vb_weight * bound

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Draws on from where the last step left the generators, whatever was drawn in between."""
        if self.random is not None:  # as it is outside a trainer
            set_random_state(self.random, self.device)
        with torch.no_grad():
            x_0, condition = self.model.encode(batch)
            if self.table:
                u = torch.rand(len(x_0), device=x_0.device)
                condition = drop(condition, self.model.null(condition), self.table, u)
        t = self.model.path.draw(draw_uniform(self.density, len(x_0), x_0.device))
        eps = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device)  # whatever the layout of x_0
        loss = self.loss(x_0, condition, eps, t).mean()
        self.random = random_state(self.device)
        self.log("train/loss", loss, prog_bar=True)  # of this process's micro-batch: no step waits for the others
        return loss

    # --- validation: the same held-out noise every time, for the condition and for its null

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        with self.averaged() as model:
            x_0, condition = model.encode(batch)
            generator = torch.Generator().manual_seed(batch_idx)
            eps = torch.randn(x_0.shape, generator=generator).to(x_0)
            u = (torch.arange(len(x_0)) + torch.rand(len(x_0), generator=generator)) / len(x_0)
            t = model.path.draw(u[torch.randperm(len(u), generator=generator)].to(x_0.device))
            self._log_validation("val/loss", x_0, condition, eps, t)
            if self.table:
                self._log_validation("val/loss_null", x_0, model.null(condition), eps, t)

    def _log_validation(self, name: str, x_0: Tensor, condition: Condition, eps: Tensor, t: Tensor) -> None:
        self.log(name, self.loss(x_0, condition, eps, t).mean(), batch_size=len(x_0), sync_dist=True)

    # --- the average of the trained network

    def on_train_start(self) -> None:
        if self.random is None:
            # One seed on all processes would give them the same noise, times and drops; and processes that the
            # checkpoint has no generators for must not begin as at step 0.
            if self.trainer.world_size > 1 or self.global_step:
                torch.manual_seed(torch.initial_seed() + self.global_rank + self.global_step)
            self.random = random_state(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Each step of the optimiser also moves the average, so that callbacks and checkpoints find it moved."""
        super().optimizer_step(*args, **kwargs)
        if self.average is None:
            return
        step = self.trainer.global_step + 1
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        self._mean = self._mean or RunningMean(self.average, self.model.network)
        self._mean.move(decay)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.max_bad_steps and self.trainer.precision != "16-mixed":  # whose scaler leaves bad steps out itself
            left = self.max_bad_steps - self.bad_steps
            self.bad_steps += leave_out_if_bad(self, optimizer, left, self.usual, self.max_gradient_growth)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self.max_bad_steps and every and batch_idx % every == 0:  # the loss is read then anyway, to be logged
            check_loss(self, outputs["loss"], batch_idx)

    @contextmanager
    def averaged(self) -> Iterator[DiffusionModel]:
        """The model with its averaged network in place, in eval mode, and with all its encoders; no weight moves."""
        live = self.model.network
        self.model.network = live if self.average is None else self.average
        modes = {module: module.training for module in self.model.network.modules()}
        self.model.network.eval()
        try:
            at_hand = self.encoders.at_hand(self.device) if self.encoders else nullcontext()
            with at_hand, uncompiled() if self.compile_network else nullcontext():
                yield self.model
        finally:
            for module, mode in modes.items():
                module.training = mode
            self.model.network = live

    # --- optimiser and checkpoint

    def configure_optimizers(self) -> Any:
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.model.network.named_parameters():
            if not parameter.requires_grad:
                continue
            factor = next((f for key, f in self.lr_multipliers.items() if key in name), 1.0)
            groups.setdefault(factor, []).append(parameter)
        parameters = [{"params": p, "lr": self.learning_rate * factor} for factor, p in groups.items()]
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay}
        clips = bool(self.trainer.gradient_clip_val)
        optimizer = adamw(parameters, self.use_8bit_adam, clips, str(self.trainer.precision), **options)
        from diffusers.optimization import get_scheduler

        name = "constant_with_warmup" if self.lr_scheduler == "constant" else self.lr_scheduler
        total = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_network(self, self.model.network)
        kept = self._kept()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["bad_steps"], checkpoint["usual_gradient"] = self.bad_steps, asdict(self.usual)
        if self.random is not None:  # (processes, bytes) each
            states: Any = self.all_gather({name: state.to(self.device) for name, state in self.random.items()})
            checkpoint["random"] = {name: state.reshape(-1, state.shape[-1]).cpu() for name, state in states.items()}

    def _kept(self) -> set[str]:
        """What checkpoints hold: the network and its average; with an adapter, what is trained of them."""
        network = self.model.network
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        names = trained if self.lora else list(network.state_dict())
        places = ("model.network", "average") if self.average is not None else ("model.network",)
        return {f"{place}.{name}" for place in places for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has taken it, and asks for no names
            checkpoint = read_checkpoint(str(self.trainer.ckpt_path)) | checkpoint
        found, wanted = checkpoint["state_dict"].keys(), self._kept()
        if missing := sorted(wanted - found):
            raise ValueError(f"the checkpoint lacks {len(missing)} of the network's tensors, {missing[0]} for one")
        if extra := sorted(found - wanted):
            raise ValueError(f"the checkpoint holds {len(extra)} tensors that the model has not, {extra[0]} for one")
        self.bad_steps, self.usual = checkpoint.get("bad_steps", 0), Usual(**checkpoint.get("usual_gradient", {}))
        states = checkpoint.get("random", {"cpu": ()})
        if self.global_rank < len(states["cpu"]):
            self.random = {name: state[self.global_rank].clone() for name, state in states.items()}
