"""How a stage ends that fails in a way nobody foresaw: a crash report in its folder and three lines; and a disk that gives out."""

import contextlib
import errno
import sys
import traceback
from pathlib import Path

import yaml

from rlhf.config import config_to_tree
from rlhf.errors import TrainingStopped, first_line
from rlhf.runs import Stage, versions

MEMORY = {"collect": ("collect.batch_size",), "compare": ("compare.batch_size",), "ppo": ("ppo.microbatch_tokens",)}  # what to lower, beside lengths
LAST_METRICS = 5  # lines of metrics.jsonl in a crash report
DISK = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission is denied", errno.EPERM: "writing is not permitted", errno.EIO: "the disk reported an input/output error"}
FULL = ("No space left on device", "os error 28",  # as safetensors puts it
        "PytorchStreamWriter failed writing", "unexpected pos", "iostream error")  # as torch.save does, which has no errno to give


def disk_trouble(error: BaseException, stage: Stage) -> TrainingStopped | None:
    """What to say when `error` means that the disk gave out while `stage` wrote; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK:
        reason = DISK[error.errno] + (f" ({error.filename})" if error.filename else "")
    elif any(words in str(error) for words in FULL):
        reason = DISK[errno.ENOSPC]
    elif isinstance(error, FileNotFoundError) and not stage.folder.is_dir():
        reason = "the folder was removed while the stage ran"
    else:
        return None
    return TrainingStopped(f"{stage.name}: {stage.folder} could not be written: {reason}. What was finished before is whole; "
                           "make room or give back the folder, and the same command goes on from the last checkpoint")


def memory_trouble(error: BaseException, stage: Stage) -> TrainingStopped | None:
    """What to say when memory ran out where no microbatch could be halved; None for any other error."""
    from rlhf.memory import is_out_of_memory  # torch, which not every command needs

    if not is_out_of_memory(error):
        return None
    settings = MEMORY.get(stage.name, ()) + ("data.max_prompt_tokens", "data.max_completion_tokens")
    return TrainingStopped(f"{stage.name}: memory ran out: {first_line(error)}. What was finished before is whole; "
                           f"lower {', '.join(settings[:-1])} or {settings[-1]}")


def report_crash(error: BaseException, stage: Stage) -> str:
    """Writes crash.txt into the stage's folder; returns three lines: what, where, how to go on."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name in ("rlhf", "stages", "data", "world")] or frames
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else "unknown place"
    path = stage.folder / "crash.txt"
    try:
        path.write_text(_text(error, stage), encoding="utf-8")
        where = f"{at}; traceback, settings, versions and last figures: {path}"
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # an empty one says nothing
        where = f"{at}; {path} could not be written:\n{''.join(traceback.format_exception(error))}"
    return (f"error: {stage.name} crashed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            f"where: {where}\n"
            "go on: the same command resumes from the last checkpoint; if it crashes again there, this is a bug: please report crash.txt")


def _text(error: BaseException, stage: Stage) -> str:
    metrics = stage.folder / "metrics.jsonl"
    last = metrics.read_text(encoding="utf-8").splitlines()[-LAST_METRICS:] if metrics.is_file() else []
    parts = {"command": " ".join(sys.argv), "traceback": "".join(traceback.format_exception(error)),
             "versions": "\n".join(f"{name} {version}" for name, version in versions().items()),
             "last figures": "\n".join(last) or "none yet",
             "settings": yaml.safe_dump(config_to_tree(stage.config), sort_keys=False, allow_unicode=True)}
    return "\n".join(f"== {name} ==\n{text.rstrip()}\n" for name, text in parts.items())
