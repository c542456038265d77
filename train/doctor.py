"""`priorguide doctor`: what a file or folder is, and whether it loads. Needs neither lightning nor wandb."""

import argparse
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..sample.bundle import Bundle
from ..sample.checkpoint import read_checkpoint
from ..sample.hub import locate
from ..sample.manifest import MANIFEST
from ..sample.model import DiffusionModel
from ..sample.models import models
from ..sample.recognise import class_name, contents, recognise
from .errors import sentence

Sets = Mapping[str, Mapping[str, Tensor]]

ELSEWHERE = (
    (r"conditioner\.embedders\.", "Stable Diffusion XL, which no model here takes"),
    (r"(.*[._])?lora_(up|down|A|B|unet|te)", "a LoRA: changes to a network, without the network"),
    (r"(control_model|controlnet\w*|input_hint_block)\.", "a ControlNet, which no model here takes"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3, which no model here takes"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux or its kin, which no model here takes"),
    (r"(down_blocks|mid_block|transformer_blocks)\.", "a network of diffusers: give its folder, with config.json"),
    (r"(encoder|decoder)\.(down|up)\.", "an autoencoder alone: it goes with a network, as vae"),
    (r"(text_model|transformer\.resblocks)\.", "a text encoder alone"),
)
"""How names begin in files that are known but not served."""

LDM_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
IN_CHANNELS = {9: "Stable Diffusion for inpainting", 5: "Stable Diffusion from depth", 7: "an upscaler"}
"""By the input channels of that tensor: U-Nets in Stable Diffusion's own layout that are known but not served."""


def doctor(args: argparse.Namespace) -> int:
    """Prints what `args.path` is: a file, a folder, or a Hub id. Exit status 0 where it loads as it is, 1 where not."""
    console = Console(width=max(100, Console().width), highlight=False)
    path = locate(args.path)
    if (path / MANIFEST).is_file():
        return _bundle(path, console)
    if (path / "config.yaml").is_file() and (last := path / "checkpoints" / "last.ckpt").is_file():
        path = last
    sets = contents(path)
    console.print(_table(path, sets))
    state = sets.get("state_dict", {})
    if state and all(name.startswith(("model.network.", "average.")) for name in state):
        return _run(path, console)
    found = recognise(path)
    for model, said in found.items():
        _say(console, f"recognised by {model.__name__}: {said}")
    if not found:
        _say(console, f"does not load: {_elsewhere(path, sets)}", "red")
    return 0 if any([_loads(model, path, console) for model in found]) else 1


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=f"bold {style}" if style else "", markup=False, soft_wrap=True)


def _table(path: File, sets: Sets) -> Table:
    """Tensors, values, bytes and types by the beginnings of names."""
    title = f"{path}: {kind}" if (kind := class_name(path)) else str(path)
    table = Table("tensors called", "tensors", "values", "size", "types", title=title, title_justify="left")
    for column in table.columns[1:4]:
        column.justify = "right"
    rows = [(f"{name}: {start}" if name else start, g) for name, held in sets.items() for start, g in _groups(held)]
    for start, group in rows:
        table.add_row(start, *_counts(group))
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *_counts([tensor for _, group in rows for tensor in group]))
    return table


def _groups(tensors: Mapping[str, Tensor]) -> list[tuple[str, list[Tensor]]]:
    """Tensors by the first part of their names; each group is called by all the parts that its names begin with."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(name.split(".")[0], {})[name] = tensor
    return [
        (".".join(os.path.commonprefix([name.split(".") for name in group])), list(group.values()))
        for group in groups.values()
    ]


def _counts(tensors: list[Tensor]) -> tuple[str, str, str, str]:
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    size = sum(tensor.nbytes for tensor in tensors)
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if size >= s or s == 1)
    return f"{len(tensors):,}", f"{sum(t.numel() for t in tensors):,}", f"{size / scale:.3g} {unit}", ", ".join(types)


def _elsewhere(path: File, sets: Sets) -> str:
    """What it may be, where no model recognises it."""
    if name := class_name(path):
        taken = sorted({name for model in models().values() for name in model.published_as})
        return f"it holds diffusers' {name}; the models here take {', '.join(taken)}"
    names = {name: tensor for tensors in sets.values() for name, tensor in tensors.items()}
    if LDM_INPUT in names and (kind := IN_CHANNELS.get(names[LDM_INPUT].shape[1])):
        return f"it looks like {kind}, which no model here takes"
    for beginning, kind in ELSEWHERE:
        if any(re.match(beginning, name) for name in names):
            return f"it looks like {kind}"
    return f"no model knows it; there are {', '.join(sorted(models()))}"


def _loads(model: Any, path: File, console: Console) -> bool:
    """Whether `from_pretrained` takes it without further arguments; prints what it then is, or the one sentence."""
    try:
        loaded = model.from_pretrained(path)
    except (ValueError, OSError) as error:
        text = sentence(str(error))
        arguments = list(inspect.signature(model.from_pretrained).parameters)[1:]
        asks = re.search(r"\bgive\b", text) and any(re.search(rf"\b{name}\b", text) for name in arguments)
        _say(console, f"{'asks' if asks else 'does not load'}: {text}", "yellow" if asks else "red")
        return False
    _say(console, f"loads as {_about(loaded)}", "green")
    return True


def _about(model: DiffusionModel) -> str:
    count = sum(parameter.numel() for parameter in model.network.parameters())
    parts = ", ".join(sorted(set().union(*model.ladder))) or "none"
    shape = " x ".join(map(str, model.shape))
    return (
        f"{type(model).__name__}: a network of {count:,} parameters, predicts {model.prediction}, x_0 of {shape} in "
        f"{model.space}, conditions: {parts}"
    )


def _bundle(path: File, console: Console) -> int:
    """Verified and loaded; BundleError says what is wrong."""
    bundle = Bundle.load(path)
    manifest, guidance = bundle.manifest, bundle.guidance
    _say(console, f"{path} is a bundle: {len(manifest['files'])} files, every hash as recorded")
    if guidance is None:
        _say(console, "a model alone, to start from or to serve as a prior")
    else:
        prior = manifest["prior"]["class"] if manifest["prior"] else "itself"
        scales = ":".join(f"{scale:g}" for scale in guidance.scales)
        recorded = f", {manifest['recorded']['batch']} recorded pictures" if manifest["recorded"] else ""
        _say(console, f"guided by {prior} at scale {scales}{recorded}: priorguide sample {path}")
    _say(console, f"loads as {_about(bundle.model)}", "green")
    return 0


def _run(path: File, console: Console) -> int:
    """A checkpoint of a fit, which holds the network and its average alone: the rest is in its run's folder."""
    _say(console, f"a checkpoint of a priorguide run, at step {read_checkpoint(path).get('global_step')}")
    run = path.parent.parent
    if not (run / "config.yaml").is_file():
        _say(console, f"does not load: {run} has no config.yaml, which says what model this is", "red")
        return 1
    _say(console, f"loads with its run: priorguide export {run} --checkpoint {path} --model-only", "green")
    return 0
