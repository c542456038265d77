"""The command line: one parser, subcommands that load only when they run."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from math import isfinite

from .errors import UsageError, sentence

EPILOG = "guidance: uncond + scale * (cond - uncond); scale 1 is the conditional prediction alone."


def parser() -> argparse.ArgumentParser:
    """Every subcommand but `fit`, whose arguments LightningCLI reads off the classes."""
    top = argparse.ArgumentParser(
        prog="priorguide",
        description="Fine-tune a conditional diffusion model, measure which unconditional prior guides it best, "
        "deploy that pair.",
        epilog=EPILOG,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG)

    quickstart = add("quickstart", "the whole story on Fashion-MNIST: fine-tune, compare, choose, export")
    quickstart.add_argument("--task", choices=("edges", "classes", "rotate"), default="edges")
    quickstart.add_argument("--out", default=None, help="a new folder (default: quickstart/TASK)")
    quickstart.add_argument("--seed", type=int, default=0, help="of the fine-tuning")
    quickstart.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")

    fit = add("fit", "fine-tune as a YAML config says")
    fit.usage = "priorguide fit --config FILE [--KEY VALUE ...]"
    fit.add_argument("--config", metavar="FILE", help="repeatable: what a later one says goes before an earlier one's")
    fit.add_argument("--KEY", metavar="VALUE", help="any key of the config, e.g. --trainer.max_steps 1000")
    fit.add_argument("--ckpt_path", metavar="PATH", help="go on from this checkpoint; `last` is the run's own last one")
    fit.add_argument("--print_config", action="store_true", help="print the whole config that would run, and stop")
    fit.epilog = f"{EPILOG} Exit status: 75 after a SIGTERM, saved; the same command with --ckpt_path last goes on."
    fit.add_argument("--options", action="store_true", help="every key there is, and what it means (takes a while)")

    cache = add("cache", "encode a config's training data once, into the folder that its data.init_args.cache names")
    cache.usage = "priorguide cache --config FILE [--KEY VALUE ...]"
    cache.add_argument("--config", metavar="FILE", help="as for fit, which would encode what is missing too")
    cache.add_argument("--KEY", metavar="VALUE", help="any key, e.g. --data.init_args.cache.folder FOLDER")
    cache.epilog = "Exit status: 75 after a SIGTERM; the same command goes on from what is encoded."

    compare = add("compare", "compare priors over scales with a run's checkpoint, and decide")
    compare.add_argument("run", help="the folder of a fit")
    text = "default: checkpoints/last.ckpt; of several, every candidate is compared with every one's weights"
    compare.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help=text)
    compare.add_argument("--scales", default=None, help="e.g. 1,1.5,2,3 or, for longer ladders, 1.5:7.5,1.5:5")
    compare.add_argument("--conditions", type=int, default=None, help="how many held-out conditions")
    compare.add_argument("--out", default=None, help="a new folder (default: RUN/comparison)")
    text = "compare each checkpoint once as it appears, into RUN/watched, until the run is complete"
    compare.add_argument("--watch", action="store_true", help=text)
    text = "with --watch: end when no checkpoint has come for so long (default: 3600)"
    compare.add_argument("--idle", type=float, default=None, metavar="SECONDS", help=text)
    text = "add votes that the page saved to the comparison (in --out, or RUN/comparison); nothing is compared"
    compare.add_argument("--votes", nargs="+", default=[], metavar="FILE", help=text)
    text = "record the team's own choice beside the verdict, for export to use; takes --reason"
    compare.add_argument("--override", default=None, metavar="PRIOR:SCALE", help=text)
    compare.add_argument("--reason", default="", help="of the override")
    text = "look for a setting of fewer evaluations that is no worse, for export to use; compares first where it must"
    compare.add_argument("--cheaper", action="store_true", help=text)
    text = "with --cheaper: how much worse is no worse, in units of what decides (default: a tenth of a distance)"
    compare.add_argument("--margin", type=float, default=None, help=text)
    text = "a label, a prompt, or a picture's path; repeatable"
    given = {"action": "append", "default": [], "metavar": "NAME=VALUE", "help": text}
    compare.add_argument("--condition", **given)  # type: ignore[arg-type]
    compare.add_argument("--seeds", default=None, help="with --condition (default: 0:4): pictures alone, no verdict")

    export = add("export", "write the fine-tuned model and its prior as one bundle, and check it")
    export.add_argument("run", help="the folder of a fit")
    export.add_argument("--checkpoint", default=None, help="default: checkpoints/last.ckpt")
    export.add_argument("--comparison", default=None, help="a compare's folder (default: RUN/comparison)")
    export.add_argument(
        "--model-only", action="store_true", help="the model alone, to start from or to serve as a prior"
    )
    export.add_argument("--prior", default=None, help="override the verdict: a candidate's name")
    export.add_argument("--scale", default=None, help="override the verdict: e.g. 3 or 1.5:7.5")
    export.add_argument("--restricted", action="store_true", help="embed a prior that not everybody may use")
    text = "how another network is stored: float32, bfloat16, int8, nf4, or owner/name@revision on the Hub"
    export.add_argument("--prior-as", default=None, metavar="HOW", help=text)
    export.add_argument("--out", default=None, help="a new folder (default: RUN/bundle)")
    text = "RUN is a bundle: write its network in diffusers' own class (DiT's) here, and say how far that is from it"
    export.add_argument("--diffusers", default=None, metavar="FOLDER", help=text)

    about = "a module of yours that registers the bundle's model; repeatable"
    own = {"action": "append", "default": [], "metavar": "MODULE", "dest": "modules", "help": about}
    sample = add("sample", "sample pictures from a bundle")
    sample.add_argument("bundle", help="the bundle's folder, or owner/name[@revision] on the Hub")
    sample.add_argument("--condition", **given)  # type: ignore[arg-type]
    sample.add_argument("--recorded", action="store_true", help="the bundle's own recorded conditions instead")
    sample.add_argument("--seeds", default=None, help="e.g. 0:16 or 3,5,8 (default: 0:4)")
    sample.add_argument("--scale", default=None, help="in place of the bundle's, e.g. 3 or 1.5:7.5")
    sample.add_argument("--steps", type=int, default=None, help="in place of the bundle's")
    sample.add_argument("--device", default="cpu")
    sample.add_argument("--compile", action="store_true", help="torch.compile, for many pictures: it takes a while")
    sample.add_argument("--import", **own)  # type: ignore[arg-type]
    sample.add_argument("--out", default="samples", help="a new folder for the PNG files")

    verify = add("verify", "recompute every hash of a bundle and replay its recorded batch")
    verify.add_argument("bundle", help="the bundle's folder, or owner/name[@revision] on the Hub")
    verify.add_argument("--device", default="cpu")
    verify.add_argument("--import", **own)  # type: ignore[arg-type]
    verify.add_argument("--hashes-only", action="store_true", help="leave the recorded batch unplayed")

    push = add("push", "upload a bundle to the Hub, with a model card")
    push.add_argument("bundle", help="the bundle's folder")
    push.add_argument("repository", help="owner/name on the Hub; made if it is not there")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument("--restricted", action="store_true", help="upload weights that not everybody may use")
    push.add_argument("--dry-run", action="store_true", help="upload nothing: print the card and the list of files")
    push.add_argument("--import", **own)  # type: ignore[arg-type]

    doctor = add("doctor", "say what a checkpoint, a folder or a Hub id is, and whether it loads")
    doctor.add_argument("path", help="a file, a folder, or a Hub id, which is fetched")
    doctor.add_argument("--import", **own)  # type: ignore[arg-type]
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 it failed, 2 it was asked wrongly."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["fit"], ["cache"]) and not {*arguments[1:]} <= {"-h", "--help"}:
        return _guarded(lambda: (_fit if arguments[0] == "fit" else _cache)(arguments[1:]))
    if arguments in (["fit"], ["cache"]):
        arguments.append("--help")
    args = parser().parse_args(arguments)
    return _guarded(lambda: _run(args))


def _fit(arguments: list[str]) -> int:
    _need("lightning", "fit")
    from ..callbacks.preemption import Preempted
    from ..callbacks.wandb_run import finish
    from .fit import fit

    status = 0
    try:
        fit(["--help" if argument == "--options" else argument for argument in arguments])
    except Preempted as stop:
        status = int(str(stop))
        if status:
            print("priorguide: stopped by SIGTERM; the same command with --ckpt_path last goes on", file=sys.stderr)
    if where := finish():
        print(where)
    return status


def _cache(arguments: list[str]) -> int:
    _need("lightning", "cache")
    from .caching import cache

    cache(arguments)
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.command in ("sample", "verify", "push", "doctor"):
        from importlib import import_module

        for module in args.modules:
            import_module(module)
        module = import_module(".doctor" if args.command == "doctor" else ".sampling", __package__)
        return getattr(module, args.command)(args)
    if args.command == "export" and args.diffusers:
        from .to_diffusers import to_diffusers

        print(to_diffusers(args.run, args.diffusers))
        return 0
    _need("lightning", args.command)
    if args.command == "quickstart":
        from .quickstart import quickstart

        quickstart(args.task, args.out, args.seed, args.threads)
    elif args.command == "compare":
        from .compare import compare_on, compare_run, decide_run

        scales = parse_scales(args.scales)
        other = (args.checkpoint, args.condition, args.cheaper, args.votes, args.override, args.out)
        if args.watch and any(other):
            raise UsageError("--watch writes into RUN/watched, and goes with --scales, --conditions and --idle alone")
        if args.idle is not None and not (args.watch and args.idle >= 0):
            raise UsageError(f"--idle goes with --watch and is 0 or more, got {args.idle}")
        if args.reason and not args.override:
            raise UsageError("--reason goes with --override PRIOR:SCALE")
        if args.margin is not None and not (args.cheaper and 0 <= args.margin < float("inf")):
            raise UsageError(f"--margin goes with --cheaper and is 0 or more, got {args.margin}")
        if args.seeds is not None and not args.condition:
            raise UsageError("--seeds goes with --condition; a comparison's own seeds are the config's")
        if args.conditions is not None and args.conditions < 1:
            raise UsageError(f"--conditions must be at least 1, got {args.conditions}")
        if args.votes or args.override:
            decide_run(args.run, args.votes, parse_override(args.override), args.reason, args.out)
        elif args.watch:
            from .watch import watch_run

            watch_run(args.run, 3600.0 if args.idle is None else args.idle, scales, args.conditions)
        elif args.cheaper:
            from .cheaper import cheaper_run

            cheaper_run(args.run, args.checkpoint, scales, args.conditions, args.margin, args.out)
        elif args.condition:
            if len(args.checkpoint) > 1:
                raise UsageError("with --condition there is one --checkpoint")
            first = next(iter(args.checkpoint), None)
            compare_on(args.run, args.condition, args.seeds or "0:4", first, scales, args.out)
        else:
            compare_run(args.run, args.checkpoint, scales, args.conditions, args.out)
    elif args.command == "export":
        from .export import export_model, export_run

        if args.model_only:
            export_model(args.run, args.checkpoint, args.out)
            return 0
        scale = parse_scales(args.scale)
        wanted = scale[0] if scale else None
        choice = (args.comparison, args.prior, wanted, args.out, args.restricted, args.prior_as)
        export_run(args.run, args.checkpoint, *choice)
    return 0


def parse_scales(text: str | None) -> list[tuple[float, ...]] | None:
    """ "1,1.5,3" as [(1,), (1.5,), (3,)], "1.5:7.5" as [(1.5, 7.5)]. UsageError for anything else."""
    if text is None:
        return None
    try:
        scales = [tuple(float(number) for number in part.split(":")) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(isfinite(number) and number >= 0 for part in scales for number in part):
        raise UsageError(f"scales must look like 1,1.5,3 or 1.5:7.5, none below 0, got {text!r}")
    return scales


def parse_override(text: str | None) -> tuple[str, tuple[float, ...]] | None:
    """ "base:3" as ("base", (3,)), "base:1.5:7.5" as ("base", (1.5, 7.5)). UsageError for anything else."""
    if text is None:
        return None
    prior, _, scale = text.partition(":")
    scales = parse_scales(scale)
    if not prior or scales is None or len(scales) != 1:
        raise UsageError(f"an override must look like base:3 or base:1.5:7.5, got {text!r}")
    return prior, scales[0]


def _need(package: str, command: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ModuleNotFoundError(f"`priorguide {command}` needs {package}: pip install 'priorguide[train]'")


def _hush() -> None:
    """transformers draws bars and prints tables over every folder it reads or writes; downloads keep their bars."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    enable_progress_bars()


def _guarded(run: Callable[[], int]) -> int:
    """One sentence instead of a traceback, unless PRIORGUIDE_TRACEBACK is set."""
    try:
        _hush()
        return run()
    except KeyboardInterrupt:
        print("priorguide: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("PRIORGUIDE_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"priorguide: {sentence(str(text)) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
