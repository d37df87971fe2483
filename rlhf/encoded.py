"""Encoded rows of a run's files as tables mapped into memory: made once for the content of a file, an encoder and the limits of length.

A table lies beside its file, in RUN/data/KIND/encoded/HASH/, or in the folder that the environment variable RLHF_CACHE names, which runs then
share. While a table is made a thousand rows are in memory, later those that were asked for. Rows that are left out are noted with the place that
they come from, and a stage lists them in its drops.json.
"""

import errno
import fcntl
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from rlhf.data.examples import LONG_COMPLETION, LONG_PROMPT
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl, replacing_folder, write_json
from rlhf.runs import file_digest

BATCH_ROWS = 1000
VERSION = 3  # another number whenever the same rows would be encoded otherwise
IDS, NUMBERS, TEXT = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float64()), pyarrow.string()
SCHEMAS = {  # of every kind of row, which has its tokens as "length" too
    "text": {"ids": IDS},
    "prompts": {"messages": pyarrow.list_(pyarrow.struct({"role": TEXT, "content": TEXT})), "ids": IDS, "id": TEXT, "family": TEXT},
    "demonstrations": {"prompt": IDS, "completion": IDS, "id": TEXT},
    "rankings": {"prompt": IDS, "completions": pyarrow.list_(IDS), "ranks": IDS, "margin": pyarrow.float64(), "gold": NUMBERS, "id": TEXT,
                 "longest": pyarrow.int32(), "left_out": pyarrow.int32()},
}


class EncodedRows(Sequence):
    """Rows of a table; `shape` makes what its readers want of one (a dict without it). `read`: rows of the file, those that were left out too.

    `dropped`: these by reason, `left_out`: rows that stay without some of their answers, as in drops.json.
    """

    def __init__(self, folder: Path, shape: Callable[[dict], object]):
        table = Dataset.from_file(str(folder / "rows.arrow"))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.read: int = about["read"]
        self.dropped: dict[str, dict] = about["dropped"]
        self.left_out: dict[str, dict] = about["left_out"]
        self.lengths: np.ndarray = table.data.column("length").to_numpy()
        self.table = table.remove_columns("length")
        self._shape = shape

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place):
        """A row, or a list of them for a slice or a list of places."""
        if isinstance(place, slice):
            place = list(range(*place.indices(len(self))))
        if not isinstance(place, list):
            return self[[place]][0]
        columns = self.table[place]
        return [self._shape(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def some(self, count: int) -> list:
        """`count` rows (or all there are) in their order, picked by a hash of their ids: the first rows of a file may be all of one source."""
        ids = self.table.data.column("id").to_pylist()
        picked = heapq.nsmallest(count, range(len(ids)), key=lambda place: hashlib.sha256(f"some {ids[place]}".encode()).digest())
        return self[sorted(picked)]

    def largest(self, column: str) -> int:
        """The largest number of a column; 0 without rows."""
        return pyarrow.compute.max(self.table.data.column(column)).as_py() or 0

    def total(self, column: str) -> int:
        """The sum of a column of whole numbers."""
        return pyarrow.compute.sum(self.table.data.column(column)).as_py() or 0

    def items_in(self, column: str) -> int:
        """Items of all lists of a column together."""
        return pyarrow.compute.sum(pyarrow.compute.list_value_length(self.table.data.column(column))).as_py() or 0


def encoded_rows(path: Path, encoder: Encoder, kind: str, recipe: Sequence, encode: Callable[[list[dict]], list[dict | str]],
                 shape: Callable[[dict], object] = lambda row: row, wanted: Callable[[dict], bool] | None = None) -> EncodedRows:
    """The rows of a file as `encode` makes them (each says its `length`), from the table if there is one already.

    An `encode` that leaves rows out returns as many things as it was given, and the reason in the place of such a row.
    `kind` names a schema, `recipe` all values that `encode` and `wanted` depend on beside rows and encoder. Rows that are not `wanted` do not
    count as read. Raises InputError for a file that is not there.
    """
    next(read_jsonl(path), None)  # complains of a missing file
    folder = _tables(path) / _name(path, encoder, kind, recipe)
    if not folder.is_dir():  # where it is there nothing is written: a finished run may lie on a disk that is read-only
        with _lock_file(folder.parent) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that want a table one makes it
            if not folder.is_dir():
                with replacing_folder(folder) as partial:
                    found = _write(partial / "rows.arrow", filter(wanted, read_jsonl(path)), kind, encode)
                    write_json(partial / "about.json", {"file": str(path), "kind": kind, "recipe": list(recipe), **found})
    return EncodedRows(folder, shape)


def demonstrations(path: Path, encoder: Encoder, max_prompt_tokens: int, max_completion_tokens: int) -> EncodedRows:
    """(prompt ids, completion ids with EOS) of a file of demonstrations, without those that are too long."""
    def encode(rows: list[dict]) -> list[dict | str]:
        prompts, completions = encoder.prompts_ids([row["prompt"] for row in rows]), encoder.completions_ids([row["completion"] for row in rows])
        return [LONG_PROMPT if len(prompt) > max_prompt_tokens else LONG_COMPLETION if len(completion) > max_completion_tokens else
                {"prompt": prompt, "completion": completion, "id": row["id"], "length": len(prompt) + len(completion)}
                for row, prompt, completion in zip(rows, prompts, completions, strict=True)]

    return encoded_rows(path, encoder, "demonstrations", (max_prompt_tokens, max_completion_tokens), encode,
                        lambda row: (row["prompt"], row["completion"]))


def write_drops(folder: Path, tables: dict[str, EncodedRows]) -> None:
    """FOLDER/drops.json: of each file of RUN/data (its name below that folder) what was left out by reason, with the places it comes from.

    `dropped` are whole rows, `left_out` rows that stay without some of their answers.
    """
    rows = [{"file": name, "read": table.read, "made": len(table), "dropped": table.dropped, "left_out": table.left_out}
            for name, table in tables.items()]
    write_json(folder / "drops.json", rows)


def _tables(path: Path) -> Path:
    shared = os.environ.get("RLHF_CACHE")
    return Path(shared) if shared else path.parent / "encoded"


def _lock_file(tables: Path):
    """The open file that is locked while a table is made. Raises InputError where nothing may be written."""
    try:
        tables.mkdir(parents=True, exist_ok=True)
        return open(tables / ".lock", "a")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise InputError(f"{tables} holds no table for these settings yet and cannot be written ({error.strerror}); name a folder for such tables "
                         "in the environment: RLHF_CACHE=FOLDER") from None


def _name(path: Path, encoder: Encoder, kind: str, recipe: Sequence) -> str:
    rules = encoder.tokenizer.backend_tokenizer.to_str() if encoder.tokenizer.is_fast else ""  # the same vocabulary may be used by other rules
    parts = json.dumps([VERSION, file_digest(path), encoder.fingerprint(), rules, kind, list(recipe)])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def _write(path: Path, rows: Iterator[dict], kind: str, encode: Callable[[list[dict]], list[dict | str]]) -> dict:
    """Writes the table; returns how many rows were `read` for it, those `dropped` and those with answers `left_out`, both by reason."""
    schema = pyarrow.schema({**SCHEMAS[kind], "length": pyarrow.int32()})
    read, dropped, left_out = 0, {}, {}
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as table:
        while batch := list(islice(rows, BATCH_ROWS)):
            read += len(batch)
            made = encode(batch)
            for place, one in enumerate(made):
                if isinstance(one, str):
                    _note(dropped, one, batch[place])
                elif one.get("left_out"):
                    _note(left_out, LONG_COMPLETION, batch[place])
            table.write(pyarrow.RecordBatch.from_pylist([row for row in made if not isinstance(row, str)], schema=schema))
    return {"read": read, "dropped": dropped, "left_out": left_out}


def _note(places: dict[str, dict], reason: str, row: dict) -> None:
    """Counts a row under a reason, with where it came from (file:line): rows of the embedded world come from no file."""
    found = places.setdefault(reason, {"rows": 0, "where": {}})
    found["rows"] += 1
    file, _, line = row.get("source", "").rpartition(":")
    if line.isdecimal():
        found["where"].setdefault(file, []).append(int(line))
