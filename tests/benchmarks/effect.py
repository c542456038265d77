"""The effect of a base prior on the three quickstart tasks, over fine-tuning seeds: one command makes the table.

    python tests/benchmarks/effect.py --seeds 0 1 2 --out effect

Every run is `priorguide quickstart` itself; runs that are there already are read, not repeated. What is printed are
each prior's best Fréchet distance and PSNR over all scales, and the verdict that the tool reached by itself on halves
of the conditions.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = {"edges": ("fd", min), "classes": ("fd", min), "rotate": ("psnr", max)}
"""The metric that decides each task in this table, and which end of it is good."""


def record(task: str, seed: int, out: Path, threads: list[str]) -> dict[str, Any]:
    """The record of one quickstart, run where it is missing."""
    folder = out / f"{task}-{seed}"
    if not (folder / "report" / "record.json").is_file():
        command = [sys.executable, "-m", "priorguide.train.cli", "quickstart", "--task", task]
        subprocess.run([*command, "--seed", str(seed), "--out", str(folder), *threads], check=True)
    return json.loads((folder / "report" / "record.json").read_text())


def best(rows: list[dict[str, Any]], prior: str, metric: str, choose: Any) -> dict[str, Any]:
    """The row of a prior's best scale; a scale of 1 evaluates no prior and is open to self alone."""
    own = [row for row in rows if row["prior"] == prior or (prior == "self" and row["prior"] == "none")]
    return choose(own, key=lambda row: row["metrics"][metric]["value"])


def line(task: str, seed: int, found: dict[str, Any]) -> tuple[str, float]:
    metric, choose = TASKS[task]
    rows = {prior: best(found["rows"], prior, metric, choose) for prior in ("self", "base")}
    value = {prior: row["metrics"][metric]["value"] for prior, row in rows.items()}
    effect = value["base"] / value["self"] if metric == "fd" else value["base"] - value["self"]
    cells = [task, str(seed), f"{found['seconds_total']:.0f} s"]
    for row in rows.values():
        psnr = row["metrics"].get("psnr")
        told = f"{row['metrics']['fd']['value']:.1f}" + (f", {psnr['value']:.2f} dB" if psnr else "")
        told += f", {row['metrics']['accuracy']['value']:.3f}"
        cells.append(f"{told} at {row['scales'][0]:g}")
    cells += [f"{effect:.3f}" if metric == "fd" else f"{effect:+.2f} dB", found["verdict"]["sentence"]]
    return "| " + " | ".join(cells) + " |", effect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("effect"))
    parser.add_argument("--threads", type=int, help="of each run; all cores by default")
    arguments = parser.parse_args()
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    print(
        "| task | seed | took | self: FD, PSNR, accuracy, scale | base: the same | base / self | the tool's verdict |"
    )
    print("|---|---|---|---|---|---|---|")
    for task in arguments.tasks:
        lines = [line(task, seed, record(task, seed, arguments.out, threads)) for seed in arguments.seeds]
        for text, _ in lines:
            print(text)
        effects = [effect for _, effect in lines]
        spread = f" ± {statistics.stdev(effects):.3f}" if len(effects) > 1 else ""
        print(f"| {task} | mean | | | | {statistics.mean(effects):.3f}{spread} | |", flush=True)


if __name__ == "__main__":
    main()
