"""The command line: `python -m stages.NAME`, `rlhf NAME`, and how each ends (exit codes in rlhf/errors.py)."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from rlhf.config import Config, describe_settings, load_config
from rlhf.crash import disk_trouble, memory_trouble, report_crash
from rlhf.errors import EXIT_CRASHED, EXIT_DONE, EXIT_INPUT, EXIT_INTERRUPTED, InputError, TrainingStopped
from rlhf.runs import nothing_open, open_now
from rlhf.terminal import Help, printable

STAGES = {
    "prepare": "reads your data, or has the embedded world write some",
    "pretrain": "makes a small GPT from the run's text, unless you name a model",
    "sft": "stage 1: imitates the demonstrations",
    "collect": "samples answers that raters rank, unless you give preferences",
    "reward": "stage 2: learns a reward model from the rankings",
    "ppo": "stage 3: the SFT model learns from the reward model's scores",
    "compare": "is PPO better than SFT? Ends in a report",
    "pipeline": "all of these, in order; a finished stage is not run again",
}
TOOLS = {"chat": "talk to any stage's model in the terminal", "data": "`rlhf data check mine.jsonl`: is your data good?",
         "bench": "how fast a PPO step is, where its time goes, and how that compares"}


def run_stage(main: Callable[[Config], None], doc: str, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Parses the command line of a stage (called as `prog`), runs `main(config)`, and returns the exit code after saying what was wrong."""
    said = "settings and their defaults (values of the experiment file go before these, those of the command line before both):\n\n"
    parser = argparse.ArgumentParser(prog=prog, description=doc, epilog=said + describe_settings(), formatter_class=Help)
    parser.add_argument("--config", help="experiment file (default: configs/quickstart.yaml)")
    parser.add_argument("--resume", action="store_true", help="what always happens: the same command goes on where it stopped")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only its last line")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    arguments = parser.parse_intermixed_args(argv)  # settings may stand before and after the flags
    if arguments.quiet:
        os.environ["RLHF_QUIET"] = "1"

    def to_the_end() -> None:
        main(load_config(arguments.config, arguments.overrides))
        if "WORLD_SIZE" in os.environ:  # `accelerate launch` started several
            from rlhf.compute import leave_processes

            leave_processes()

    return guarded(to_the_end)


def guarded(action: Callable[[], None]) -> int:
    """Runs `action`; errors that a person can act on become one message and their exit code, others a crash report in the stage's folder."""
    nothing_open()
    try:
        action()
    except (InputError, TrainingStopped) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        stage = open_now()
        if stage is None or not stage.main:
            raise
        trouble = disk_trouble(error, stage) or memory_trouble(error, stage)
        print(printable(f"error: {trouble}" if trouble else report_crash(error, stage)), file=sys.stderr)
        return trouble.exit_code if trouble else EXIT_CRASHED
    return EXIT_DONE


def end_early_interrupts() -> None:
    """From now on a Ctrl-C outside `guarded` ends this process in one line: that of `python -m stages.NAME` while torch loads."""
    def told(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(_interrupted_early())
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = told


def _interrupted_early() -> int:
    print("\ninterrupted before anything was done", file=sys.stderr)
    return EXIT_INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """`rlhf NAME ...`: NAME is a stage or one of the tools."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        stages, tools = ("".join(f"  {name:<10}{line}\n" for name, line in part.items()) for part in (STAGES, TOOLS))
        print("usage: rlhf NAME [...]\n\n`rlhf pipeline` runs the whole recipe and ends with a report in runs/quickstart.\n\n"
              f"stages, in order:\n{stages}\ntools:\n{tools}\n`rlhf NAME --help` says more; that of a stage lists the settings")
        return EXIT_DONE
    name, rest = argv[0], argv[1:]
    if name not in STAGES and name not in TOOLS:
        print(f"error: rlhf {name}: no such command; wanted one of {', '.join((*STAGES, *TOOLS))}", file=sys.stderr)
        return EXIT_INPUT
    try:
        module = importlib.import_module(f"stages.{name}" if name in STAGES else "rlhf.data.check" if name == "data" else f"rlhf.{name}")
    except KeyboardInterrupt:  # torch and transformers take seconds to load
        return _interrupted_early()
    return run_stage(module.main, module.__doc__, rest, f"rlhf {name}") if name in STAGES else module.main(rest)
