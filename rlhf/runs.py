"""The run folder (DESIGN): a stage opens its folder, logs into it, and leaves DONE last.

A stage knows its own experiment by a fingerprint of the settings it reads and of its parents' DONE files, so that a finished stage is
never run again by accident, never mixed with another experiment, and never kept when a parent has changed.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from rlhf.config import Config, config_to_tree
from rlhf.contents import contents, is_function
from rlhf.errors import InputError, TrainingStopped
from rlhf.jsonl import replacing, write_json
from rlhf.metrics import check_names
from rlhf.paths import PACKAGE

READS = {  # the sections of settings that decide what a stage makes, beside seed
    "prepare": ("data", "world", "reward.ties"),
    "pretrain": ("model", "pretrain", "run.precision"),
    "sft": ("model", "data", "sft", "run.precision"),
    "collect": ("collect", "data", "run.precision", "world.agreement", "pipeline.rounds"),
    "reward": ("model", "data", "reward", "run.precision"),
    "judge": ("model", "data", "reward", "run.precision"),
    "ppo": ("model", "data", "ppo", "reward.members", "run.precision"),
    "compare": ("compare", "data", "reward.members", "ppo.ensemble", "ppo.uncertainty_coef", "ppo.score", "ppo.mix", "run.precision"),
}
_locks: dict[Path, object] = {}
_open: list["Stage"] = []  # the stage this process works on, for crash reports


class Stage:
    """An open stage folder. Only the main process writes; the others hold the same object and their calls do nothing."""

    def __init__(self, name: str, folder: Path, config: Config, main: bool):
        self.name, self.folder, self.config, self.main = name, folder, config, main
        self._metrics = None

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()

    def log(self, step: int, **figures) -> None:
        """Adds a line to metrics.jsonl; names must stand in the glossary (rlhf/metrics.py), what is no number becomes null.

        Raises TrainingStopped when the folder was removed meanwhile.
        """
        check_names(figures)
        if self.main:
            if not (self.folder / "manifest.json").is_file():
                raise TrainingStopped(f"{self.name}: {self.folder} was removed while the stage ran; nothing more was written. "
                                      "The same command starts the stage anew")
            if self._metrics is None:
                self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
            self._metrics.write(json.dumps({"step": step, **{k: _rounded(v) for k, v in figures.items()}}) + "\n")
            self._metrics.flush()

    def forget_after(self, step: int, closing: str | None = None) -> None:
        """Drops logged lines past `step`, and the closing line (the one with the figure `closing`), which a resumed stage logs again."""
        path = self.folder / "metrics.jsonl"
        if self.main and path.is_file():
            with open(path, encoding="utf-8") as lines:  # a line without its end was cut when the machine stopped
                rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            with replacing(path) as file:
                file.writelines(line for line, row in rows if row["step"] <= step and closing not in row)

    def finish(self, **results) -> None:
        """Writes DONE with the digest of what was made; the stage's checkpoints are no longer needed and go."""
        if self.main:
            if self._metrics is not None:
                self._metrics.close()
            digest = file_digest(self.model / "model.safetensors") if self.model.is_dir() else None
            write_json(self.folder / "DONE", {"fingerprint": self._manifest["fingerprint"], "model_sha256": digest, **results})
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # after DONE: a checkpoint half removed must not be gone on from
            (self.folder / "crash.txt").unlink(missing_ok=True)
        nothing_open()

    def begin(self, parents: dict[str, str], inputs: dict[str, str]) -> None:
        """Writes config.yaml and manifest.json, or refuses a folder that belongs to another experiment. Raises InputError."""
        self._manifest = {
            "stage": self.name, "fingerprint": _fingerprint(self.name, self.config, parents, inputs), "seed": self.config.seed,
            "commit": source_commit(), "versions": versions(), "parents": parents, "inputs": inputs, "command": " ".join(sys.argv),
            "processes": int(os.environ.get("WORLD_SIZE", "1")), "contents": contents(self.name, self.config),
        }
        old = self.folder / "manifest.json"
        if old.is_file():
            found = json.loads(old.read_text(encoding="utf-8"))
            _refuse_other_experiment(self, found)
            _refuse_other_processes(self, found)
        if self.main and self.done:
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # of a process killed right after DONE
        elif self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "config.yaml") as file:
                yaml.safe_dump(config_to_tree(self.config), file, sort_keys=False, allow_unicode=True)
            write_json(old, self._manifest)


def open_stage(name: str, config: Config, parents: tuple[str, ...] = (), inputs: dict[str, str] | None = None, within: str = "") -> Stage:
    """The folder RUN/[within/]NAME, opened to be written. `parents` are stages (paths below RUN) that must be DONE; `inputs`: name -> digest.

    Raises InputError when a parent is missing, the folder holds another experiment, or another process works on the run.
    """
    run = Path(config.run.dir)
    digests = parent_digests(name, run, parents)
    stage = Stage(name, run / within / name, config, is_main())
    _open[:] = [stage]  # before its first word is written, for which the disk may have no room
    if stage.main:
        lock_run(run)
    stage.begin(digests, inputs or {})
    if stage.done:
        nothing_open()
    return stage


def parent_digests(name: str, run: Path, parents: tuple[str, ...]) -> dict[str, str]:
    """The digest of every parent's DONE file. Raises InputError, in the name of the command that wants them, when one is not finished."""
    digests = {}
    for parent in parents:
        done = run / parent / "DONE"
        if not done.is_file():
            alone = "" if "/" in parent else f"`python -m stages.{parent}`, or "  # the pipeline alone makes the rounds before the last
            raise InputError(f"{name} needs the finished stage {parent}, and {done} is not there. Run {alone}`python -m stages.pipeline` for all of "
                             "them, with the same --config and run.dir first")
        digests[parent] = file_digest(done)
    return digests


def open_now() -> Stage | None:
    """The stage that this process has opened and not finished, if any."""
    return _open[0] if _open else None


def nothing_open() -> None:
    """Forgets a stage that failed, where one process runs several commands."""
    _open.clear()


def is_main() -> bool:
    """True in the one process that writes (accelerate sets RANK for the others)."""
    return int(os.environ.get("RANK", "0")) == 0


def lock_run(run: Path) -> None:
    """Holds RUN/.lock until this process ends. The system frees it even after kill -9, and forked processes give up their share of it at once
    (_close_locks), so a lock is never stale. Raises InputError."""
    run = run.resolve()
    if run in _locks:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"run.dir={run}: cannot be written ({error.strerror}); name another folder with run.dir=...") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise InputError(f"{run}: process {file.read().strip() or '?'} works on this run; wait, stop it, or name another run.dir=...") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks[run] = file


def _close_locks() -> None:
    """In a process forked from one that holds locks: what is open in both would stay locked until both have ended."""
    for file in _locks.values():
        file.close()  # the parent's lock stays; unlocking would take it away
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    names = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_commit() -> str:
    """The commit of this checkout, '+changes' when files differ from it, or 'unknown' outside a checkout."""
    def git(*words):
        return subprocess.run(["git", "-C", str(PACKAGE.parent), *words], capture_output=True, text=True, timeout=10)
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode or not (PACKAGE.parent / ".git").exists():
            return "unknown"
        return head.stdout.strip() + ("+changes" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _relevant(name: str, config: Config) -> dict:
    tree = config_to_tree(config)
    picked: dict = {"seed": tree["seed"]}
    for entry in READS[name]:
        section, _, key = entry.partition(".")
        free = _not_deciding(name, section, config)
        if key not in free:
            picked[entry] = tree[section][key] if key else {k: v for k, v in tree[section].items() if k not in free}
    return picked


def _not_deciding(stage: str, section: str, config: Config) -> tuple[str, ...]:
    """Settings of a section that may change during a run without changing what a stage makes."""
    if stage == "prepare" and section == "reward":
        return () if config.data.preferences else ("ties",)  # it leaves tied rows out of what is given; raters rank later
    if section != "ppo":
        return ()
    return ("save_every",) if config.ppo.hand_over == "best" else ("save_every", "eval_every", "eval_prompts")


def _fingerprint(name: str, config: Config, parents: dict, inputs: dict) -> str:
    return hashlib.sha256(json.dumps([_relevant(name, config), parents, inputs], sort_keys=True).encode()).hexdigest()[:16]


def _refuse_other_experiment(stage: Stage, old: dict) -> None:
    before = old.get("contents", {})  # runs of earlier versions noted none
    replaced = [name for name, digest in stage._manifest["contents"].items() if before.get(name, digest) != digest
                and not (stage.done and is_function(name))]  # whose file may have got another function since
    if old.get("fingerprint") == stage._manifest["fingerprint"] and not replaced:
        return
    if {path.name.removesuffix(".partial") for path in stage.folder.iterdir()} <= {"config.yaml", "manifest.json", "crash.txt"}:
        return  # a start that came to nothing, say over a mistyped file name: there is no work to protect; the main process may be writing anew
    config = stage.folder / "config.yaml"
    saved = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    changes = [f"the finished stage {p} has changed since" for p, d in stage._manifest["parents"].items() if old.get("parents", {}).get(p) != d]
    inputs, before = stage._manifest["inputs"], old.get("inputs", {})
    changes += [f"the input {p} has changed since" for p in inputs if p in before and inputs[p] != before[p]]
    changes += [f"what {name} names has changed since" for name in replaced]
    now, new = config_to_tree(stage.config), config_to_tree(Config())  # a setting that did not exist then had the effect of its default
    for entry in ("seed", *READS[stage.name]):
        section, _, key = entry.partition(".")
        for field in [key] if key else (now[section] if isinstance(now[section], dict) else [None]):
            if field is None:
                was, wanted = saved.get(section), now[section]
            else:
                was, wanted = saved.get(section, {}).get(field, new[section][field]), now[section][field]
            if was != wanted and field not in _not_deciding(stage.name, section, stage.config):
                changes.append(f"{section}{'.' + field if field else ''} was {was!r} and is now {wanted!r}")
    if not any(change.startswith("data.") for change in changes):  # else a setting names other files
        changes += [f"the input {p} is {'new' if p in inputs else 'gone'}" for p in {**inputs, **before} if (p in inputs) != (p in before)]
    if saved and not changes:
        return
    raise InputError(f"{stage.folder} holds another experiment: {'; '.join(changes) or 'its settings differ'}. Nothing was written. "
                     f"{'Put back what was there, name' if replaced else 'Name'} another folder with run.dir=..., or delete {stage.folder} and the "
                     "stages after it")


def _refuse_other_processes(stage: Stage, old: dict) -> None:
    """A stage goes on with as many processes as it began with: pretrain's batches and everybody's rounding follow from their number."""
    now = stage._manifest["processes"]
    was = old.get("processes", now)
    if was != now and not stage.done and stage.checkpoints.is_dir():
        raise InputError(f"{stage.folder} was begun by {was} process{'es' * (was > 1)} and cannot be gone on with by {now}. Nothing was written. "
                         f"Start it with {was} again, or delete {stage.checkpoints} to begin the stage anew")


def _rounded(value):
    """Seven digits of a float; None for nan and the infinities, which JSON has no word for."""
    return (float(f"{value:.7g}") if math.isfinite(value) else None) if isinstance(value, float) else value
