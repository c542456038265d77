"""From what a comparison drew to its evaluation, and what its priors draw by themselves."""

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ..sample.agreement import as_pictures, as_texts
from ..sample.compare import compare
from ..sample.evaluate import Drawn, Evaluation, judge
from ..sample.guidance import Arm, Guidance
from ..sample.health import Health, null_health
from ..sample.saturation import saturation
from ..sample.verdict import Rule
from .shares import Encoded


def judged(comparison: Any, drawn: Drawn, data: Any, device: torch.device, rule: Rule | None = None) -> Evaluation:
    """What a PriorComparison drew, measured and watched for guidance that goes too far; by a rule, decided, and beside
    what real pictures reach."""
    n = len(next(iter(drawn.pictures.values())))
    batch = data.held_out(n)
    with isolate_rng(), torch.no_grad(), comparison.on_device(device):
        evaluation = judge(
            drawn.pictures,
            network=comparison.metric_network,  # type: ignore[arg-type]
            reference=data.reference(comparison.num_reference, offset=n) if comparison.reference_needed() else None,
            target=batch.get("pixels") if comparison.has_target else None,
            label=batch.get("class", batch.get("label")),
            text=as_texts(batch.get("text")),
            image=as_pictures(batch.get("image")),
            image_text=as_texts(batch.get("image_text")),
            clip=comparison.clip,  # type: ignore[arg-type]
            perceptual=comparison.perceptual,
            metrics=comparison.metrics,
            rule=rule,
            costs=drawn.costs,
            floor=batch.get("pixels") if rule else None,
        )
    real, energies = batch["pixels"], drawn.energies
    watched = {arm: saturation(images, real, energies[arm]) for arm, images in drawn.pictures.items() if energies}
    return replace(evaluation, saturation=watched)


def health(comparison: Any, pl_module: L.LightningModule, held: Encoded, n: int) -> dict[str, Health]:
    """The null prediction of every network on the first n held-out pictures, see `null_health`."""
    device, size = pl_module.device, min(comparison.sizes.values(), default=16)
    with isolate_rng(), torch.no_grad(), pl_module.averaged() as model:  # type: ignore[operator]
        priors = comparison._bind(model)
        with comparison.on_device(device):
            x_0, condition = held.x_0(model, n, 16, device), held.condition(model, n, 16, device)
            plain = {name: prior for name, prior in priors.items() if prior is None or not prior.keep}
            mix = {name: candidate.mix for name, candidate in comparison.priors.items()}
            return null_health(model, plain, x_0, condition, mix=mix, batch_size=size)


def unguided_pictures(comparison: Any, pl_module: L.LightningModule, held: Encoded, n: int) -> dict[str, Tensor]:
    """What each prior draws by itself, its null prediction alone, from the comparison's first n noises: (n, C, H, W).

    At scale 0 the guided prediction is p_0, whatever the ladder. Priors that see a part of the condition are left out.
    """
    size = min(comparison.sizes.values(), default=n)
    with isolate_rng(), torch.no_grad(), pl_module.averaged() as model:  # type: ignore[operator]
        scales = (0.0,) * len(model.ladder)
        bound = comparison._bind(model)
        alone: dict[Arm, Guidance] = {
            (name, scales): Guidance(scales, bound[name], mix=candidate.mix)
            for name, candidate in comparison.priors.items()
            if not candidate.keep
        }
        with comparison.on_device(pl_module.device):
            condition = held.condition(model, n, size, pl_module.device)
            seeds = [comparison.seed + i for i in range(n)]
            drawn = compare(model, condition, seeds, alone, comparison.sampler, batch_size=size)
    return {name: pictures for (name, _), pictures in drawn.items()}
