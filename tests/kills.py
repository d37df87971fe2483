"""Kills runs at random moments, starts them again by the same command, and looks whether they end as if nothing had happened.

    python -m tests.kills                                             # 50 kills of the whole pipeline of configs/tiny.yaml
    python -m tests.kills --kills 7 --per-stage 1 --processes 2 run.precision=fp32
    python -m tests.kills --config configs/quickstart.yaml --per-stage 8 --reach 0.25 run.threads=2    # most of an hour

One run is left alone, then others of the same settings are killed by SIGKILL, every process of them at once. Each kill has a stage, all of
them in turn, and a moment drawn from most of the time that stage took in the first run; where a resumed stage is done sooner, it meets the
next one. Every other kill then waits until something is being written, and falls into it. When a killed run has ended, all it left is
compared with the first: the sha256 of every model.safetensors, the metrics without times, the data, rollouts, samples and DONE files.
In configs/tiny.yaml checkpoints are written every other step, and settings switch on whatever has a state of its own to lose (a moving average,
the best weights, an adaptive KL coefficient, an ensemble); another experiment runs as it is.
Prints a line for each kill and `N kills, every model the same` last; exit code 0 when that is so.
Processes are forked from one that has imported everything: kills then hit the stages, not the imports.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "pretrain", "sft", "collect", "reward", "ppo", "compare")
TINY = "configs/tiny.yaml"
SETTINGS = ("run.save_every=2", "run.threads=1", "collect.batch_size=64", "reward.members=2", "ppo.rollouts=6", "ppo.save_every=1",
            "ppo.eval_every=1", "ppo.ema_decay=0.9", "ppo.kl_target=2", "ppo.ptx_coef=0.1", "ppo.hand_over=best")
PRELOADED = ("stages.pipeline", "peft", "transformers.models.gpt2.modeling_gpt2")
TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")
LEFT_OUT = ("config.yaml", "manifest.json", ".lock", "about.json")  # they name the folder, the command and the commit
LOOK_EVERY = 0.005  # seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-stage", type=int, default=2, help="kills of a run in each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reach", type=float, default=0.8, help="a kill's moment is drawn from this share of its stage's time")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--config", default=TINY)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings beside those of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    preload()
    rng, seen, wrong = random.Random(arguments.seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        def start(run: Path) -> list:
            settings = SETTINGS if arguments.config == TINY else ()
            words = ["pipeline", "--config", arguments.config, f"run.dir={run}", *settings, *arguments.overrides]
            return fork(words, run.with_suffix(".log"), arguments.processes)

        whole = Path(folder) / "whole"
        seconds = _left_alone(whole, start(whole))
        expected = contents(whole)
        print(f"left alone: {', '.join(f'{s} {t:.1f} s' for s, t in seconds.items())}; {len(expected)} files to compare", flush=True)
        runs = 0
        while seen.total() < arguments.kills and not wrong:
            run, runs = Path(folder) / f"run{runs}", runs + 1
            targets = [stage for stage in STAGES for _ in range(arguments.per_stage)][: arguments.kills - seen.total()]
            for stage in targets:
                _kill(start(run), run, stage, rng.uniform(0, arguments.reach * seconds[stage]), seen, while_writing=seen.total() % 2 == 1)
            _finish(start(run), run)
            found = contents(run)
            wrong = sorted(str(name) for name in expected.keys() | found.keys() if found.get(name) != expected.get(name))
            print(f"run {runs}: {'the same' if not wrong else 'DIFFERS in ' + ', '.join(wrong)}", flush=True)
            shutil.rmtree(run)
    print(f"killed in {', '.join(f'{stage} {seen[stage]}' for stage in STAGES)}; {seen.total()} kills in {runs} runs")
    print(f"{seen.total()} kills, {'every model the same' if not wrong else 'NOT the same'}")
    return 1 if wrong else 0


def preload() -> None:
    """The large libraries, once for all processes; nothing is computed, so that they may be forked."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    for name in PRELOADED:
        importlib.import_module(name)


def fork(words: list[str], log: Path, processes: int = 1) -> list[multiprocessing.Process]:
    """Starts `rlhf WORDS...`, as `accelerate launch` would with several processes; what they say is added to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        launched = {} if processes == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                                              "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        started.append(multiprocessing.get_context("fork").Process(target=_child, args=(words, log, launched)))
        started[-1].start()
    return started


def _child(words: list[str], log: Path, environment: dict[str, str]) -> None:
    from rlhf import cli

    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = cli.main(words)
    sys.stdout.flush()
    os._exit(code)


def _left_alone(run: Path, processes: list) -> dict[str, float]:
    """Seconds that each stage took."""
    seconds, began = {}, time.perf_counter()
    for stage in STAGES:
        while not (run / stage / "DONE").is_file() and any(p.is_alive() for p in processes):
            time.sleep(LOOK_EVERY)
        seconds[stage], began = time.perf_counter() - began, time.perf_counter()
    _finish(processes, run)
    return seconds


def _kill(processes: list, run: Path, stage: str, moment: float, seen: Counter, while_writing: bool) -> None:
    """Lets the run come to `stage`, and kills it `moment` seconds later, or where it then is; a run that ended is not a kill."""
    born = time.time()
    while _stage_of(run) in STAGES[: STAGES.index(stage)] and all(p.is_alive() for p in processes):
        time.sleep(LOOK_EVERY)
    until = time.perf_counter() + moment
    while time.perf_counter() < until and all(p.is_alive() for p in processes):
        time.sleep(LOOK_EVERY)
    while while_writing and not _being_written(run, born) and all(p.is_alive() for p in processes):
        pass  # a file is there for some milliseconds
    if not all(p.is_alive() for p in processes):
        _finish(processes, run)
        return
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    where = _stage_of(run)
    writing = _being_written(run, born)
    seen[where] += 1
    print(f"kill {seen.total()}: {where}, {moment:.2f} s in{f', while {writing} was written' if writing else ''}", flush=True)


def _being_written(run: Path, since: float) -> str:
    """A file or folder that was begun after `since` (seconds of the clock) and has not been renamed into its place, or an empty string."""
    for folder, folders, files in os.walk(run):
        for name in folders + files:
            if name.endswith("partial") and name != "config.yaml.partial":  # whose turn is always at once
                with contextlib.suppress(OSError):  # renamed just now
                    if os.stat(os.path.join(folder, name)).st_mtime >= since:
                        return os.path.relpath(os.path.join(folder, name), run)
    return ""


def _stage_of(run: Path) -> str:
    """The first stage that is not finished; the last one of a finished run."""
    return next((stage for stage in STAGES if not (run / stage / "DONE").is_file()), STAGES[-1])


def _finish(processes: list, run: Path) -> None:
    """Waits for the end. Raises SystemExit when it is not a good one."""
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        time.sleep(LOOK_EVERY)
    codes = [process.exitcode for process in processes]
    if any(codes):
        for process in processes:
            process.kill()  # one that waits for another that failed
        sys.exit(f"{run.name} ended with {codes}:\n{run.with_suffix('.log').read_text()[-3000:]}")


def contents(run: Path) -> dict[Path, str]:
    """Digests of everything a finished run left but pages, paths and times."""
    files = (p for p in run.rglob("*") if p.is_file() and p.name not in LEFT_OUT and p.suffix not in (".html", ".md"))
    return {p.relative_to(run): _digest(p) for p in files if p.name != "summary.json"}  # whose figures are those of samples.jsonl


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        content = json.dumps([{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]).encode()
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
