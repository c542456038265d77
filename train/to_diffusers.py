"""`priorguide export BUNDLE --diffusers FOLDER`: a network of ours in diffusers' own class, and how far that is."""

import inspect
import json
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..sample.bundle import INDEX, Bundle
from ..sample.components import companions
from ..sample.loop import Sampler, trajectories
from ..sample.machine import threads_of
from ..sample.manifest import MANIFEST, canonical, new_folder
from ..sample.model import DiffusionModel, with_network
from ..sample.noise import add_noise


class Stock(nn.Module):
    """A network of diffusers, called as ours is."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *args: Tensor) -> Tensor:
        return self.network(*args).sample


def to_diffusers(bundle: str | File, out: str | File) -> str:
    """Writes the bundle's model as a folder of diffusers alone, and returns what it is and the measured difference.

    It is the pipeline, or, of a model without an autoencoder, network and scheduler; the prior, which no stock pipeline
    has, is left behind. BundleError; ValueError where there is nothing to convert.
    """
    if not (File(bundle) / MANIFEST).is_file():
        raise ValueError(f"{bundle} is no bundle: export the run first, then give its bundle to --diffusers")
    held = Bundle.load(bundle)
    model, sampler = held.model, held.sampler or Sampler()
    scheduler = held.scheduler or sampler.make(model)
    scheduler.set_timesteps(sampler.steps)
    times = scheduler.timesteps.double()
    network: Any = model.stock_network(times)
    names = (held.manifest["provenance"] or {}).get("class_names") or ()
    with new_folder(File(out)) as folder:
        if pipeline := _pipeline(model, network, scheduler):
            pipeline.save_pretrained(folder)
            if names:  # which DiTPipeline reads from there, and does not write
                index = json.loads((folder / INDEX).read_text())
                index["id2label"] = {str(label): name for label, name in enumerate(names)}
                (folder / INDEX).write_bytes(canonical(index))
        else:
            network.save_pretrained(folder / model.network_name)
            scheduler.save_pretrained(folder / "scheduler")
    name = type(pipeline or network).__name__
    return f"{out} holds a {name}, without the prior; {differences(held, Stock(network), times)}"


def _pipeline(model: DiffusionModel, network: nn.Module, scheduler: Any) -> Any:
    """The model's pipeline in diffusers, or None where it needs parts that the model does not have."""
    import diffusers

    kind: Any = getattr(diffusers, model.published_as[0])
    parts = {model.network_name: network, **companions(model), "scheduler": scheduler}
    wanted = inspect.signature(kind).parameters
    if any(name not in parts for name, argument in wanted.items() if argument.default is argument.empty):
        return None
    return kind(**parts)


@torch.no_grad()
def differences(bundle: Bundle, stock: Stock, times: Tensor) -> str:
    """How far the stock network's predictions are from the model's, at its sampler's times and at others, and the
    recorded pictures without the prior, in words."""
    model, theirs = bundle.model, with_network(bundle.model, stock)
    recorded = bundle.recorded() if bundle.manifest["recorded"] else None
    generator = torch.Generator().manual_seed(0)
    condition = recorded.condition if recorded else model.null({})
    rows = len(recorded.seeds) if recorded else 4
    x_0 = model.encode_pixels(recorded.pictures) if recorded else torch.randn(rows, *model.shape, generator=generator)
    condition = {name: part.expand(rows, *part.shape[1:]) for name, part in condition.items()}

    def relative(at: Tensor) -> float:
        found = []
        for t in at:
            eps = torch.randn(x_0.shape, generator=generator)
            t = t.expand(rows)
            x_t = add_noise(x_0, eps, *model.path.coefficients(t))
            ours, other = (network.denoise(x_t, t.float(), condition) for network in (model, theirs))
            found.append(((other - ours).square().mean() / ours.square().mean()).sqrt().item())
        return sum(found) / len(found)

    spread = torch.linspace(0, len(times) - 1, min(len(times), 10)).round().long()
    others = torch.tensor([t for t in range(50, 1000, 100) if t not in times.tolist()], dtype=torch.float64)
    said = (
        f"its prediction differs from the model's by {relative(times[spread]):.2e} of its size at the sampler's "
        f"{len(times)} times, by {relative(others):.2e} at others"
    )
    if recorded is None or bundle.guidance is None or bundle.sampler is None:
        return said
    guidance, sampler = replace(bundle.guidance, prior=None), bundle.sampler
    options: dict[str, Any] = {"scheduler": bundle.scheduler, "steps": sampler.steps, "eta": sampler.eta}
    with threads_of(recorded.threads):
        ours, other = (
            m.decode(trajectories(m, condition, recorded.seeds, [guidance], **options)[0]) for m in (model, theirs)
        )
    difference = (ours - other).abs()
    return f"{said}, and {rows} pictures by {difference.mean():.1e} of 1 on average, {difference.max():.1e} at most"
