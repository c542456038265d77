"""From what a comparison drew to its evaluation, by the comparison's metrics and networks."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from ..sample.agreement import as_pictures, as_texts
from ..sample.evaluate import Drawn, Evaluation, judge
from ..sample.saturation import saturation
from ..sample.verdict import Rule


def judged(comparison: Any, drawn: Drawn, data: Any, device: torch.device, rule: Rule | None = None) -> Evaluation:
    """What a PriorComparison drew, measured and watched for guidance that goes too far; by a rule, decided, and beside
    what real pictures reach."""
    n = len(next(iter(drawn.pictures.values())))
    batch = data.held_out(n)
    with isolate_rng(), torch.no_grad(), comparison.on_device(device):
        evaluation = judge(
            drawn.pictures,
            network=comparison.metric_network,  # type: ignore[arg-type]
            reference=data.reference(comparison.num_reference, offset=n) if comparison._reference() else None,
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
