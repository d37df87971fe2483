"""JSON lines and whole files, written beside and renamed into place so that a reader never sees half a file."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import InputError

_ENCODER, _QUICK_ENCODER = json.JSONEncoder(ensure_ascii=False), json.JSONEncoder()


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of one of our own files, in order. Raises InputError naming file and line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON ({error.msg}); the file was changed or cut after it was written") from None


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes rows whole or not at all; returns how many."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def json_line(row: dict) -> str:
    """One row as it stands in a file."""
    line = _QUICK_ENCODER.encode(row)  # in two thirds of the time, and the same unless a character was spelled \\uXXXX
    return (_ENCODER.encode(row) if "\\u" in line else line) + "\n"


def write_json(path: Path, value) -> None:
    """Writes one JSON value, indented, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


@contextmanager
def replacing(path: Path, mode: str = "w"):
    """An open file (text; bytes with mode "wb") that takes the place of `path` when the block ends well; flushed to disk before the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextmanager
def replacing_folder(path: Path):
    """A new empty folder that takes the place of `path` when the block ends well."""
    beside, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(beside, path)
    shutil.rmtree(old, ignore_errors=True)
