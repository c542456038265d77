"""The time and the memory of loading an original checkpoint of Stable Diffusion 1.5's size, beside reading the file.

    python tests/benchmarks/loading.py [--rounds 3]

The file has the original's names and shapes, and random float32 values: 4.27 GB, in a temporary folder. Every
measurement is a process of its own, taken in turns, with the file in the system's cache. Loading ends when a value of
every page of every weight has been read. This process stays small: what it starts would count its memory as its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARAMETERS = {"network": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
PEAK, SECONDS = 1.2, 2.0
"""The aims: of the peak to the file's size, and of the seconds to those of reading it."""


def write(path: Path) -> None:
    """The file. AssertionError unless its parts have the published numbers of parameters."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from priorguide.sample import ldm

    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    widths = [128, 256, 512, 512]
    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768, down_block_types=down, up_block_types=up)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=widths,
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    parts = {"network": network, "vae": vae, "text_encoder": text}
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == PARAMETERS
    shapes = {ldm.UNET + ldm.unet_name(name, 2, 4): p.shape for name, p in network.state_dict().items()}
    shapes |= {ldm.CLIP + name.removeprefix("text_model."): p.shape for name, p in text.state_dict().items()}
    for name, p in vae.state_dict().items():
        attention = ".attentions.0.to_" in name and p.ndim == 2  # there they are 1x1 convolutions
        shapes[ldm.VAE + ldm.vae_name(name, 4)] = (*p.shape, 1, 1) if attention else p.shape
    save_file({name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}, path)


def touch(tensors: Iterable[Any]) -> None:
    """Reads one value of every 4 kB of float32."""
    for tensor in tensors:
        tensor.detach().flatten()[::1024].sum()


def measure(what: str, path: Path) -> dict[str, float]:
    """Seconds, and bytes by which the peak of resident memory rises, of one way to read the file, imports apart."""
    from priorguide.sample.checkpoint import read_checkpoint
    from priorguide.sample.models.stable_diffusion import StableDiffusion

    StableDiffusion.tiny()  # imports what is imported late
    before, start = peak(), time.perf_counter()
    held: Any = None
    if what == "bytes":
        held = path.read_bytes()
    elif what == "tensors":
        held = read_checkpoint(path)
        touch(held.values())
    else:
        held = StableDiffusion.from_pretrained(path)
        touch(held.state_dict().values())
    return {"seconds": time.perf_counter() - start, "rise": peak() - before, "peak": peak(), "before": before}


def peak() -> int:
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def apart(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
        return
    if arguments.measure:
        what, path = arguments.measure
        print(json.dumps(measure(what, Path(path))))
        return
    found: dict[str, list[dict[str, float]]] = {"bytes": [], "tensors": [], "model": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v1-5.safetensors"
        apart("--write", str(path))
        size = path.stat().st_size
        for number in range(arguments.rounds + 1):
            for what, rows in found.items():
                row = json.loads(apart("--measure", what, str(path)).splitlines()[-1])
                if number:
                    rows.append(row)
    seconds = {what: statistics.median(row["seconds"] for row in rows) for what, rows in found.items()}
    rises = {what: max(row["rise"] for row in rows) for what, rows in found.items()}
    print(f"a file of {size / 1e9:.2f} GB, {sum(PARAMETERS.values()):,} parameters\n")
    print("| way | seconds | beside reading | rise of the peak | beside the file |\n|---|---|---|---|---|")
    ways = {"bytes": "the file's bytes", "tensors": "its tensors", "model": "`StableDiffusion.from_pretrained`"}
    for what, way in ways.items():
        time_ratio, memory_ratio = seconds[what] / seconds["bytes"], rises[what] / size
        print(f"| {way} | {seconds[what]:.2f} | {time_ratio:.2f} | {rises[what] / 1e9:.2f} GB | {memory_ratio:.2f} |")
    whole = max(row["peak"] for row in found["model"])
    print(f"\nWith Python and its libraries the loading process peaks at {whole / 1e9:.2f} GB.")
    met = rises["model"] <= PEAK * size and seconds["model"] <= SECONDS * seconds["bytes"]
    print(f"The aims, {PEAK} x the file and {SECONDS:g} x the seconds of reading it, are {'' if met else 'not '}met.")


if __name__ == "__main__":
    main()
