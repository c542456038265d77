"""The sizes of bundles of Stable Diffusion 1.5's size in their forms, what fewer bits change, and import times.

    python tests/benchmarks/bundles.py [--width 320]

The network has the published architecture and random weights; --width makes it narrower. An adapter of rank 16 on its
attention, and a first convolution of four more channels, make the fine-tune; its base is the prior.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from priorguide.sample.adapter import FILE, Adapter
from priorguide.sample.bundle import Bundle
from priorguide.sample.candidates import with_network
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.precision import PRECISIONS, at_precision, guided_change
from priorguide.sample.published import tiny_parts

IMPORTS = {
    "torch and diffusers": "import torch, diffusers",
    "with their classes": "from diffusers import AutoencoderKL, UNet2DConditionModel, DDIMScheduler",
    "priorguide.sample": "import priorguide.sample",
    "priorguide.sample.bundle": "import priorguide.sample.bundle",
}


def import_seconds() -> dict[str, float]:
    """Of each line of IMPORTS after those before it, in one new process."""
    code = "import json, time\nfound = {}\n"
    for name, line in IMPORTS.items():
        code += f"start = time.perf_counter()\n{line}\nfound[{name!r}] = time.perf_counter() - start\n"
    done = subprocess.run([sys.executable, "-c", code + "print(json.dumps(found))"], capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def base_of(width: int) -> StableDiffusion:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        attention_head_dim=8,
    )
    return StableDiffusion(**{**vars(tiny_parts(4)), "network": network}, sample_size=8).eval()


def adapted(base: StableDiffusion, rank: int = 16) -> tuple[InstructPix2Pix, Adapter]:
    model = InstructPix2Pix.from_base(base, resolution=16).eval()
    factors = {
        name: (0.02 * torch.randn(rank, layer.in_features), 0.02 * torch.randn(layer.out_features, rank))
        for name, layer in model.network.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    adapter = Adapter(model.network, factors)
    return with_network(model, adapter.merged().eval()), adapter  # type: ignore[return-value]


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--width", type=int, default=320)
    width = arguments.parse_args().width
    for name, seconds in import_seconds().items():
        print(f"import {name:<28} {seconds:8.3f} s")
    base = base_of(width)
    model, adapter = adapted(base)
    guidance = Guidance((1.5, 7.5), unconditional(base, onto=model))
    recipe = {"sampler": Sampler(steps=2)}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        alone = megabytes(Bundle.save(at / "base", base))
        both = Bundle.save(at / "adapter", model, guidance=guidance, adapter=adapter, **recipe)  # type: ignore[arg-type]
        size, file = megabytes(both), (both / FILE).stat().st_size / 1e6
        print(
            f"the base alone {alone:.1f} MB; base, adapter and prior {size:.1f} MB, the adapter's file {file:.1f} MB:"
        )
        print(f"{size / (alone + file) - 1:+.2%} beyond base + adapter")
        x_0, image = torch.randn(2, *model.shape), torch.randn(2, *model.shape)
        condition = {"image": image, "text": torch.randn(2, *model.null_text.shape[1:])}
        moved = copy.deepcopy(model.network)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
        model = with_network(model, moved)
        guidance = Guidance((1.5, 7.5), unconditional(base, onto=model))
        for precision in ("float32", *PRECISIONS):
            now, options = guidance, {}
            if precision != "float32":
                now = replace(guidance, prior=at_precision(guidance.prior, precision))  # type: ignore[arg-type]
                change = guided_change(model, guidance, now, x_0, condition)["mean_relative_rms"]
                options = {"prior_held": precision}
            full = Bundle.save(at / precision, model, guidance=now, **recipe, **options)  # type: ignore[arg-type]
            told = "" if precision == "float32" else f", guided prediction moved by {change:.2e} of its size"
            print(f"tuned in full, the prior in {precision:<9} {megabytes(full):9.1f} MB{told}")


if __name__ == "__main__":
    main()
