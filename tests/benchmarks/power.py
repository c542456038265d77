"""Power and truth of the verdict on the quickstart's tasks: how often it says what is true, and how often what is not.

    python tests/benchmarks/power.py --out power               # the runs that are missing, then the tables
    python tests/benchmarks/power.py --out power --read-only   # the tables of the runs that are there

A run is a quickstart at a reduced size: the task's own config, fine-tuned from a seed of its own, its candidates
sampled from the same noise and conditions, its verdict by the config's own rule. Truth is what reference runs say
together, of other seeds and with more conditions. A run's scores are kept in a file, so that a study goes on where it
was stopped; two processes with --seeds of their own share the work.

False claims are counted on real pictures: one fine-tune under self and base's names, from independent noise.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from priorguide.callbacks.comparison import PriorComparison
from priorguide.sample.distances import Reference, frechet_distance
from priorguide.sample.guidance import Arm
from priorguide.sample.metrics import Scores, score
from priorguide.sample.verdict import Comparison, Rule, decide
from priorguide.train.fit import build

CONFIGS = {"edges": "fashion_edges.yaml", "classes": "fashion_classes.yaml", "rotate": "fashion_rotate.yaml"}
TRUTH = {"edges": "better", "classes": "no difference", "rotate": "worse"}
"""What the reference runs must say of base, or the bounds below mean nothing."""
OUTCOMES = ("better", "no difference", "guard broken", "worse")
EFFECT = {"edges": "fd", "classes": "fd", "rotate": "psnr"}
LEAST, MOST_WRONG = 16, 1
"""Of 20 runs of a task so many say the truth at least; of all 60 so many claim something false at most. Set after a
pilot (seeds 100 and 101, which are the reference runs) and before the 20 seeds."""
SCALES, STEPS, REFERENCE = (1.0, 1.5, 2.0), 16, 3000
SEEDS, CONDITIONS = range(20), 800
REFERENCE_SEEDS, REFERENCE_CONDITIONS = (100, 101), 2000
NULL_SEED, NULL_CONDITIONS, NULL_SCALES = 200, 2000, (1.5, 2.0)


def settings(task: str) -> dict[str, Any]:
    return yaml.safe_load((files("priorguide.configs") / CONFIGS[task]).read_text())


def rule_of(task: str) -> Rule:
    callbacks = settings(task)["trainer"]["callbacks"]
    return Rule(**next(c["init_args"]["rule"] for c in callbacks if c["class_path"].endswith("PriorComparison")))


def tuned(task: str, seed: int, folder: str) -> Any:
    """A quickstart's fine-tune with nothing logged, saved or compared on the way: the objects of its command line."""
    config = settings(task)
    config |= {"seed_everything": seed, "threads": 1, "checkpoint": {"every_n_train_steps": 10**9, "save_last": False}}
    trainer = config["trainer"]
    trainer |= {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer |= {"enable_model_summary": False, "default_root_dir": folder}
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].endswith("PriorComparison")]
    options = trainer["callbacks"][0]["init_args"]
    options |= {"every_n_steps": 10**9, "num_reference": REFERENCE}
    options["sampler"]["steps"] = STEPS
    cli = build(config, run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


def scored(cli: Any, conditions: int, scales: Iterable[float], noise: int = 0) -> tuple[dict[Arm, Scores], Scores]:
    """Every arm's scores, and the reference's."""
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, PriorComparison))
    callback.seed = noise
    data, network = cli.datamodule, callback.metric_network
    pictures = callback.evaluate(cli.model, data, scales=tuple(scales), num_conditions=conditions).pictures
    batch = data.held_out(conditions)
    target, label = (batch["pixels"] if callback.has_target else None), batch.get("class", batch.get("label"))
    found = {arm: score(images, network=network, target=target, label=label) for arm, images in pictures.items()}
    return found, score(data.reference(REFERENCE, offset=conditions), network=network)


def compared(task: str, seed: int, conditions: int) -> dict[Arm, Scores]:
    with tempfile.TemporaryDirectory() as folder:
        found, real = scored(tuned(task, seed, folder), conditions, SCALES)
    return found | {("reference", (0.0,)): real}


def twice(task: str, seed: int, conditions: int) -> dict[Arm, Scores]:
    """Self from two independent noises, under the names self and base."""
    with tempfile.TemporaryDirectory() as folder:
        cli = tuned(task, seed, folder)
        (own, real), (other, _) = (scored(cli, conditions, NULL_SCALES, noise) for noise in (0, 10**6))
    again = {("base", scales): scores for (prior, scales), scores in other.items() if prior == "self"}
    own = {arm: scores for arm, scores in own.items() if arm[0] == "self"}
    return own | again | {("reference", (0.0,)): real}


# Files


def write(path: Path, found: dict[Arm, Scores]) -> None:
    tensors = {}
    for (prior, (scale,)), scores in found.items():
        tensors[f"{prior}@{scale:g}/features"] = scores.features
        tensors |= {f"{prior}@{scale:g}/{metric}": values for metric, values in scores.per_condition.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def read(path: Path) -> tuple[dict[Arm, Scores], torch.Tensor]:
    """The arms, and the reference's features."""
    arms: dict[Arm, Scores] = {}
    with safe_open(path, "pt") as held:
        for name in held.keys():  # noqa: SIM118
            arm, metric = name.split("/")
            prior, scale = arm.split("@")
            scores = arms.setdefault((prior, (float(scale),)), Scores())
            if metric == "features":
                scores.features = held.get_tensor(name)
            else:
                scores.per_condition[metric] = held.get_tensor(name)
    real = arms.pop(("reference", (0.0,))).features
    assert real is not None
    return arms, real


# Tables


def said(path: Path, rule: Rule) -> Comparison:
    """What the verdict says of base."""
    (found,) = decide(*read(path), rule).comparisons
    return found


def in_words(c: Comparison) -> str:
    low, high = c.interval
    return f"{c.outcome}: {c.metric} {c.difference:+.4f} ({low:+.4f} to {high:+.4f})"


def effect(path: Path, metric: str) -> float:
    """Base against self, each at its own best scale over all conditions: a ratio of Fréchet distances, or the
    difference in a metric per condition. A scale of 1 evaluates no prior and is open to self alone."""
    arms, real = read(path)
    reference = Reference(real)

    def value(scores: Scores) -> float:
        if metric == "fd":
            assert scores.features is not None
            return frechet_distance(scores.features, reference)
        return scores.per_condition[metric].mean().item()

    best = min if metric == "fd" else max
    own = best(value(scores) for (prior, (scale,)), scores in arms.items() if prior == "self" or scale == 1)
    base = best(value(scores) for (prior, (scale,)), scores in arms.items() if prior == "base" and scale != 1)
    return base / own if metric == "fd" else base - own


def power(folder: Path, seeds: Iterable[int]) -> None:
    columns = ("task, rule", "effect", "reference runs", "runs", *OUTCOMES, "right", "wrong")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    wrong_in_all, sound = 0, True
    for task, truth in TRUTH.items():
        rule = rule_of(task)
        reference = [said(folder / f"{task}-{seed}.safetensors", rule) for seed in REFERENCE_SEEDS]
        paths = [path for seed in seeds if (path := folder / f"{task}-{seed}.safetensors").is_file()]
        outcomes = [said(path, rule).outcome for path in paths]
        count = {name: outcomes.count(name) for name in OUTCOMES}
        # Where base is no better, "guard broken" deploys self and claims nothing; where it is better, it names nothing.
        right = count[truth] + (count["guard broken"] if truth == "no difference" else 0)
        wrong = sum(count[name] for name in ("better", "worse") if name != truth)
        wrong_in_all += wrong
        sound &= right >= LEAST and all(one.outcome == truth for one in reference)
        told = "; ".join(in_words(one) for one in reference)
        guards = ", ".join(f"{name} {allowed:g}" for name, allowed in rule.guards.items())
        effects = [effect(path, EFFECT[task]) for path in paths]
        spread = statistics.stdev(effects) if len(effects) > 1 else math.nan
        size = f"{EFFECT[task]} {statistics.mean(effects):.3f} ± {spread:.3f}"
        named = f"{task}, {rule.decide_by}" + (f" (guard {guards})" if guards else "")
        print(f"| {named} | {size} | {told} | {len(outcomes)}", *count.values(), right, f"{wrong} |", sep=" | ")
    print(f"\nAt least {LEAST} of 20 right in each task, at most {MOST_WRONG} of 60 wrong: ", end="")
    print("met" if sound and wrong_in_all <= MOST_WRONG else "NOT MET")


def false_claims(path: Path, repeats: int = 1000, count: int = 400, references: int = 1500) -> None:
    """Resampled comparisons of one distribution with itself: conditions at random, and which noise bears which name."""
    arms, real = read(path)
    draw = torch.Generator().manual_seed(0)
    total = len(next(iter(arms.values())).per_condition["psnr"])
    claims: dict[str, int] = {"kid": 0, "mmd": 0, "psnr": 0}
    for _ in range(repeats):
        rows = torch.randperm(total, generator=draw)[:count]
        swap = torch.rand(count, generator=draw) < 0.5
        reference = real[torch.randperm(len(real), generator=draw)[:references]]
        mixed = {}
        for scale in NULL_SCALES:
            first, second = arms["self", (scale,)], arms["base", (scale,)]
            mixed["self", (scale,)] = chosen(first, second, rows, swap)
            mixed["base", (scale,)] = chosen(second, first, rows, swap)
        for metric in claims:
            (found,) = decide(mixed, reference, Rule(metric, {})).comparisons
            claims[metric] += found.outcome != "no difference"
    limit = 0.05 + 1.645 * math.sqrt(0.05 * 0.95 / repeats)  # one-sided, 95 %
    print(f"| decided by | differences claimed in {repeats} comparisons of one distribution | at most {limit:.1%} |")
    print("|---|---|---|")
    for metric, number in claims.items():
        print(f"| {metric} | {number} ({number / repeats:.1%}) | {'met' if number / repeats <= limit else 'NOT MET'} |")


def chosen(a: Scores, b: Scores, rows: torch.Tensor, swap: torch.Tensor) -> Scores:
    """Some rows of a, of b where `swap`."""

    def mix(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(swap.view(-1, *[1] * (x.ndim - 1)), y[rows], x[rows])

    assert a.features is not None and b.features is not None
    return Scores(mix(a.features, b.features), {"psnr": mix(a.per_condition["psnr"], b.per_condition["psnr"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("power"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the runs to make, in this order")
    parser.add_argument("--read-only", action="store_true", help="make no run")
    given = parser.parse_args()
    jobs: list[tuple[str, int, int, Callable[..., dict[Arm, Scores]]]] = []
    jobs += [(task, seed, REFERENCE_CONDITIONS, compared) for seed in REFERENCE_SEEDS for task in CONFIGS]
    jobs += [("edges", NULL_SEED, NULL_CONDITIONS, twice)]
    jobs += [(task, seed, CONDITIONS, compared) for seed in given.seeds for task in CONFIGS]
    for task, seed, conditions, make in [] if given.read_only else jobs:
        if not (path := given.out / f"{task}-{seed}.safetensors").exists():
            print(f"fine-tuning {task} from seed {seed}", flush=True)
            write(path, make(task, seed, conditions))
    power(given.out, SEEDS)
    print()
    false_claims(given.out / f"edges-{NULL_SEED}.safetensors")


if __name__ == "__main__":
    main()
