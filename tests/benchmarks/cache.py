"""Fine-tuning on encoded samples against encoding at every step, and beside diffusers' own trainer.

    python tests/benchmarks/cache.py [--diffusers train_instruct_pix2pix.py] [--rounds 3] [--steps 8] [--batch 4]
        [--resolution 128] [--threads 1]

Random weights in Stable Diffusion 1.5's layout (U-Net, text encoder, autoencoder) and in DiT-XL/2's, all at an eighth
of their width, on JPEG pictures. `--diffusers` takes the path of diffusers' examples/instruct_pix2pix script, which
is run as it is by its own command line: the same base, pictures, batch, precision, drop-out, clipping and average.
Each way is a process of its own, in turns. Images per second are of the steps between the second and the last, by
processor time, so that neither start and end nor other work on the machine count, and by the clock; memory is the
process's peak until then, by the kernel's own count. The script needs torchvision. The cached way fills its cache in
its first round, whose memory therefore counts the encoders too.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

SHARE, FIRST = 8, 2
"""Widths are divided by SHARE; FIRST: steps that are not counted."""
PROGRESS = re.compile(rb"(?:Steps|Epoch \d+):[^\r\n]*?\| (\d+)/\d+ \[")
OPERATORS = """
import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Lets a torchvision built for CUDA be imported beside a torch for the CPU: it asks for these without having them."""


class Run(NamedTuple):
    images_per_cpu_second: float
    images_per_second: float
    peak_mib: float


def write_base(folder: Path, resolution: int) -> None:
    """Stable Diffusion 1.5's layout as diffusers saves it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from priorguide.sample.text import tiny_text

    torch.manual_seed(0)
    width = 768 // SHARE
    unet = UNet2DConditionModel(
        sample_size=resolution // 8,
        block_out_channels=tuple(side // SHARE for side in (320, 640, 1280, 1280)),
        norm_num_groups=8,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(side // SHARE for side in (128, 256, 512, 512)),
        norm_num_groups=8,
        layers_per_block=2,
        latent_channels=4,
        sample_size=resolution,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    tokenizer = tiny_text(length=77)[1]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Pairs of JPEG pictures with instructions, for both trainers."""
    generator, lines = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(count):
        row = {"edit_prompt": f"make it number {number}"}
        for name in ("original_image", "edited_image"):
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{name}{number}.jpg", quality=90)
            row[f"{name}_file_name"] = f"{name}{number}.jpg"
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_labelled(folder: Path, pairs: Path) -> None:
    (folder / "one").mkdir(parents=True)
    for file in pairs.glob("*.jpg"):
        shutil.copy(file, folder / "one")


def config(name: str, work: Path, arguments: argparse.Namespace, cache: Path | None) -> dict[str, Any]:
    """The shipped config of the system, on this base and these pictures, without comparisons."""
    found = yaml.safe_load((Path(str(files("priorguide.configs"))) / f"{name}.yaml").read_text())
    bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar", "init_args": {"refresh_rate": 1}}
    found["trainer"] |= {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": arguments.steps,
        "accumulate_grad_batches": 1,
        "limit_val_batches": 0,
        "gradient_clip_val": 1.0,
        "logger": False,
        "callbacks": [bar],
    }
    options = {"train_batch_size": arguments.batch, "resolution": arguments.resolution, "num_workers": 0}
    found["data"]["init_args"] |= {**options, "random_flip": False, "source": str(work / "pictures")}
    if cache:
        found["data"]["init_args"]["cache"] = {"folder": str(cache)}
    model = found["model"]["model"]["init_args"]
    if name == "instruct_pix2pix":
        model["base"]["init_args"]["pretrained_model_name_or_path"] = str(work / "base")
        model["resolution"] = arguments.resolution
    else:
        found["data"]["init_args"]["source"] = str(work / "labelled")
        found["model"]["model"] = {
            "class_path": "priorguide.sample.models.dit.DiT.create",
            "init_args": {
                "input_size": arguments.resolution // 8,
                "num_classes": 1,
                "channels": 4,
                "width": 1152 // SHARE,
                "depth": 28,
                "num_heads": 16,
                "learn_sigma": True,
                "vae": str(work / "base" / "vae"),
            },
        }
    return found


def command(way: str, work: Path, arguments: argparse.Namespace) -> list[str]:
    out = tempfile.mkdtemp(dir=work)
    if way == "diffusers":
        return [
            *(sys.executable, arguments.diffusers, "--pretrained_model_name_or_path", str(work / "base")),
            *("--train_data_dir", str(work / "pictures"), "--output_dir", out, "--seed", "0", "--center_crop"),
            *("--original_image_column", "original_image", "--edited_image_column", "edited_image"),
            *("--edit_prompt_column", "edit_prompt", "--resolution", str(arguments.resolution), "--use_ema"),
            *("--train_batch_size", str(arguments.batch), "--max_train_steps", str(arguments.steps)),
            *("--conditioning_dropout_prob", "0.05", "--cache_dir", str(work / "datasets"), "--learning_rate", "1e-4"),
        ]
    name, _, kept = way.partition(", ")
    made = config(name, work, arguments, work / f"{name}-cache" if kept == "cached" else None)
    made["trainer"]["default_root_dir"] = out
    (file := Path(out).with_suffix(".yaml")).write_text(yaml.safe_dump(made))
    return [sys.executable, "-m", "priorguide.train.cli", "fit", "--config", str(file)]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak(pid: int) -> float:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


def measure(way: str, work: Path, arguments: argparse.Namespace) -> Run:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TQDM_MININTERVAL": "0",
    }
    if way == "diffusers":
        environment["PYTHONPATH"] = os.pathsep.join([str(work / "path"), arguments.path])
    log, marks, held = b"", {}, b""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(way, work, arguments), env=environment, bufsize=0, **pipes) as run:
        assert run.stdout is not None
        while part := run.stdout.read(65536):
            log, held = log + part, held[-2000:] + part
            step = max((int(found) for found in PROGRESS.findall(held)), default=0)
            if step >= FIRST and step not in marks:
                marks[step] = cpu_seconds(run.pid), time.perf_counter(), peak(run.pid)
    marks.pop(arguments.steps, None)  # by the time that it is seen, the checkpoint is being written
    if run.returncode or len(marks) < 2:
        raise SystemExit(f"{way} failed ({run.returncode}):\n{log.decode(errors='replace')[-3000:]}")
    first, last = min(marks), max(marks)
    images = (last - first) * arguments.batch
    used, passed, _ = (b - a for a, b in zip(marks[first], marks[last], strict=True))
    return Run(images / used, images / passed, marks[last][2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", metavar="SCRIPT")
    parser.add_argument("--path", default="", help="where the script finds torchvision, if not in this environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="of the ways, those that start so")
    arguments = parser.parse_args()
    ways = [f"{name}, {kept}" for name in ("instruct_pix2pix", "dit") for kept in ("uncached", "cached")]
    ways = (["diffusers"] if arguments.diffusers else []) + [way for way in ways if way.startswith(arguments.only)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_base(work / "base", arguments.resolution)
        write_pictures(
            work / "pictures", -(-(arguments.steps + 1) * arguments.batch * 10 // 8), 2 * arguments.resolution
        )
        write_labelled(work / "labelled", work / "pictures")
        (work / "path").mkdir()
        trial = {"env": {**os.environ, "PYTHONPATH": arguments.path}, "capture_output": True, "check": False}
        if subprocess.run([sys.executable, "-c", "import torchvision"], **trial).returncode:
            (work / "path" / "sitecustomize.py").write_text(OPERATORS)
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way in ways:
                runs[way].append(measure(way, work, arguments))
                print(way, *(f"{value:.2f}" for value in runs[way][-1]), flush=True)
    print(
        "\n| | images per processor second, ratio | images per second, ratio | peak memory, ratio |\n|---|---|---|---|"
    )
    for way in ways:
        reference = (
            "diffusers" if arguments.diffusers and not way.startswith("dit") else way.split(",")[0] + ", uncached"
        )
        cells = []
        for number in range(3):
            typical = [statistics.median(run[number] for run in runs[name]) for name in (way, reference)]
            cells.append(f"{typical[0]:.1f}, {typical[0] / typical[1]:.2f}")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
