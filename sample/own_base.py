"""Whether a prior is the very network that the model's own adapter was trained on: then no second one need be held."""

import torch
from torch import Tensor, nn

from .adapter_rows import UNTUNED, unadapted
from .bits import bits_of, in_few_bits
from .guidance import unconditional
from .model import DiffusionModel


def adapted(model: DiffusionModel) -> bool:
    """Whether there is an adapter in the model's network."""
    return any(".lora_" in name for name, _ in model.network.named_parameters())


def why_another(base: DiffusionModel, model: DiffusionModel) -> str | None:
    """None where the prior `base` predicts at its null what an adapted model does at its own with the adapter off;
    otherwise the first thing found that makes it another.

    None is for where path, prediction, latents and null are the same, and every weight is, but for what the model's
    class says is `added`: there the base's lies within the model's, the rest being zero (new input channels), or ends
    in the same row (classes, the last of which is the null); and both are asked once, since a base may lack such parts.
    Weights in fewer bits are those of no other network.
    """
    terms = {
        "noise schedule": (base.path, model.path),
        "prediction": (base.prediction, model.prediction),
        "space of latents": ((base.space, base.shape[0]), (model.space, model.shape[0])),
    }
    for name, (other, own) in terms.items():
        if other != own:
            return f"its {name} is not that of the adapter's base"
    nulls = base.null({}), model.null({})
    both = nulls[0].keys() & nulls[1].keys()
    if not all(_equal(nulls[0][name], nulls[1][name]) for name in both if nulls[0][name].is_floating_point()):
        return "its null condition is not that of the model"
    if (held := next(in_few_bits(model.network), None)) is not None:
        return (
            f"the base below the adapter is in {bits_of(held[1])}, which no other network is (`base: base` shares it)"
        )
    if not _same_weights(base, model):
        return "its weights are not those of the adapter's base"
    return None if _same_prediction(base, model) else "it does not predict what the adapter's base does"


def _same_weights(base: DiffusionModel, model: DiffusionModel) -> bool:
    own, others = _before(model.network), base.network.state_dict()
    added = {name for name in own if name.startswith(model.added)} if model.added else set()
    old = [name for name in others if name not in own]
    new = [name for name in own if name not in others and name not in added]  # as a wrapper renames its layers
    if len(old) != len(new) or any(tensor.requires_grad for tensor in own.values()):
        return False
    names = {name: name for name in others if name in own} | dict(zip(old, new, strict=True))
    if any(others[a].shape != own[b].shape for a, b in names.items() if b not in added):
        return False
    pairs = sorted(names.items(), key=lambda pair: others[pair[0]].numel())  # small ones tell another network at once
    return all((_within if b in added else _equal)(others[a], own[b]) for a, b in pairs)


def _before(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapted network as they were without the adapter, by the names that they had; no copies."""
    held = network.state_dict(keep_vars=True)
    state = {name.replace(".base_layer.", "."): t for name, t in held.items() if ".lora_" not in name}
    kept = {name.replace(f".{UNTUNED}.", "."): t for name, t in state.items() if f".{UNTUNED}." in name}
    return {name: t for name, t in state.items() if f".{UNTUNED}." not in name} | kept


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))


def _within(part: Tensor, whole: Tensor) -> bool:
    if part.shape[1:] == whole.shape[1:] and len(part) != len(whole):
        return _equal(part[-1:], whole[-1:])
    if part.ndim != whole.ndim or any(n > m for n, m in zip(part.shape, whole.shape, strict=True)):
        return False
    corner = whole[tuple(slice(n) for n in part.shape)]
    return _equal(part, corner) and bool(whole.count_nonzero() == corner.count_nonzero())


@torch.no_grad()
def _same_prediction(base: DiffusionModel, model: DiffusionModel) -> bool:
    modes = {module: module.training for module in model.network.modules()}
    model.network.eval()
    try:
        x_t, t = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
        found = []
        for one in (base, unadapted(model)):
            weight = next(p for p in one.network.parameters() if p.is_floating_point())
            null = unconditional(one, onto=model).condition(model.null({}), 1)
            null = {name: part.to(weight.device) for name, part in null.items()}
            out = one.denoise(x_t.to(weight), one.path.draw(t).to(weight.device), null)
            found.append(out.float().cpu())
            rounding = torch.finfo(weight.dtype).eps ** 0.5
    finally:
        for module, mode in modes.items():
            module.training = mode
    return bool((found[0] - found[1]).abs().max() <= rounding * found[1].abs().max())
