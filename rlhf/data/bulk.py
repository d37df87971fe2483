"""All kinds of canonical row that are wanted of a source, from one reading of it; large files of JSON lines are shared among processes.

What a row becomes depends on that row alone, so any process may convert it; only the order of the rows and which prompts were seen before
belong together, and those the main process keeps. The result does not depend on how many processes there are. In memory are a few batches
of rows, eight bytes for each different prompt, and the numbers of dropped lines.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from rlhf.data.converting import REPEATED, Group, Part, Report, examples_of, groups_of, open_part, prompt_key, refuse_nothing, rows_of
from rlhf.data.formats import Format
from rlhf.data.reading import is_plain_text, lines_of, parts_of, renamed, row_of_line
from rlhf.data.splits import split_of
from rlhf.jsonl import json_line

BATCH_ROWS, BATCH_BYTES = 1000, 4 * 2**20  # a batch of JSON lines ends at either
BATCH_GROUPS = 16  # of what is read in other ways, where nobody knows beforehand how large a row is
ALONE = 8  # batches that the main process converts itself before it starts others: small files are done by then
FEW_GROUPS = 32  # made into all kinds before the next are looked at: with 1,000 they have left the processor's cache, which took a third longer
AHEAD = 2  # batches for each process on their way

Shares = dict[str, tuple[float, float]]  # kind -> shares of eval and test


@dataclass
class Piece:
    """What a batch of rows became as one kind, and a report on them. A prompt is only counted once it is known to be new."""

    report: Report
    lines: dict[str, tuple[int, bytes]] = field(default_factory=dict)  # by split: how many, and they themselves
    asked: list[tuple[bytes, int, int, str, str]] = field(default_factory=list)  # of prompts: key, line, turns, split, the row as it is written


def convert_all(source: str, reports: dict[str, Report], mapping: dict[str, str] | None, shares: Shares, keep_ties: bool,
                processes: int) -> Iterator[tuple[str, str, int, bytes]]:
    """(kind, split, how many lines, the lines) of a source as they come, in the order of its rows; fills the reports (one for each kind).

    The rows, drops and errors of a kind are those of `rlhf.data.convert`. `processes`: how many convert, if there is enough for them.
    """
    seen: set[bytes] = set()
    for name in parts_of(source):
        for part, kinds in _readings(name, reports, mapping):
            convert = partial(_convert, part.name, part.form, {kind: shares[kind] for kind in kinds}, keep_ties)
            for pieces in _converted(part, convert, mapping, processes):
                for kind, piece in pieces.items():
                    if kind == "prompts":
                        _leave_out_repetitions(piece, part.name, seen)
                    reports[kind].add(piece.report)
                    yield from ((kind, split, *lines) for split, lines in piece.lines.items())
    for report in reports.values():
        refuse_nothing(report)


def _readings(name: str, reports: dict[str, Report], mapping: dict[str, str] | None) -> list[tuple[Part, list[str]]]:
    """How often a file is to be read, and for which kinds each time: once, unless the kinds take it for different schemas."""
    readings: dict[tuple[str, bool], tuple[Part, list[str]]] = {}
    for kind, report in reports.items():
        part = open_part(name, kind, mapping, report)
        line_by_line = kind == "prompts" and is_plain_text(name)
        readings.setdefault((part.form.name, line_by_line), (part, []))[1].append(kind)
    return list(readings.values())


def _converted(part: Part, convert: Callable[..., dict[str, Piece]], mapping: dict[str, str] | None, processes: int) -> Iterator[dict[str, Piece]]:
    """The batches of a part, converted, in their order."""
    lines = lines_of(part.name) if part.form.group is None else None
    if lines is None:
        groups = groups_of(part.rows, part.form.group)
        while batch := list(islice(groups, BATCH_GROUPS)):
            yield convert(batch)
    else:
        yield from _in_order(partial(_convert_lines, convert, mapping), _batches(lines), processes)


def _batches(lines: Iterable[tuple[int, bytes | None]]) -> Iterator[list[tuple[int, bytes | None]]]:
    batch, size = [], 0
    for line, content in lines:
        batch.append((line, content))
        size += len(content or b"")
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(work: Callable, batches: Iterator, processes: int) -> Iterator:
    """work(batch) of each batch in turn; after the first few by other processes where they can be forked (elsewhere a start takes seconds)."""
    yield from map(work, islice(batches, ALONE if processes > 1 and sys.platform == "linux" else None))
    first = next(batches, None)
    if first is None:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _end_with_parent) as pool:
        waiting = deque([pool.submit(work, first)])
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _end_with_parent() -> None:
    """Ends this process when the one that forked it is gone, killed perhaps: otherwise it would wait for batches for ever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _convert_lines(convert: Callable, mapping: dict[str, str] | None, lines: list[tuple[int, bytes | None]]) -> dict[str, Piece]:
    rows = ((line, row_of_line(content)) for line, content in lines)
    if mapping:
        rows = ((line, renamed(row, mapping) if isinstance(row, dict) else row) for line, row in rows)
    return convert(groups_of(rows, None))


def _convert(part: str, form: Format, shares: Shares, keep_ties: bool, groups: Iterable[Group]) -> dict[str, Piece]:
    """Groups of rows as each of the kinds."""
    groups, pieces = iter(groups), {kind: Piece(Report(part, kind)) for kind in shares}
    lines: dict[str, dict[str, list[str]]] = {kind: {} for kind in shares}
    while few := list(islice(groups, FEW_GROUPS)):
        examples, read = list(examples_of(form, few)), sum(len(rows) for _, rows in few)
        for kind, fractions in shares.items():
            pieces[kind].report.read += read
            _add(pieces[kind], lines[kind], rows_of(examples, part, kind, pieces[kind].report, keep_ties), fractions)
    for kind, piece in pieces.items():
        piece.lines = _joined(lines[kind])
    return pieces


def _add(piece: Piece, lines: dict[str, list[str]], rows: Iterable[tuple[int, dict]], fractions: tuple[float, float]) -> None:
    for line, row in rows:
        split = split_of(row["id"], *fractions)
        if piece.report.kind == "prompts":
            piece.asked.append((prompt_key(row), line, len(row["prompt"]), split, json_line(row)))
        else:
            piece.report.count(row)
            lines.setdefault(split, []).append(json_line(row))


def _joined(lines: dict[str, list[str]]) -> dict[str, tuple[int, bytes]]:
    return {split: (len(rows), "".join(rows).encode()) for split, rows in lines.items()}


def _leave_out_repetitions(piece: Piece, part: str, seen: set[bytes]) -> None:
    """Counts the prompts of a piece that are new; the others are dropped, in the order of their lines among those dropped for other reasons."""
    repeated, lines = [], {}
    for key, line, turns, split, text in piece.asked:
        if key in seen:
            repeated.append(line)
            continue
        seen.add(key)
        piece.report.made += 1
        piece.report.turns[turns] += 1
        lines.setdefault(split, []).append(text)
    piece.lines = _joined(lines)
    if repeated:
        piece.report.dropped[REPEATED] = {part: repeated}
        piece.report.dropped = dict(sorted(piece.report.dropped.items(), key=lambda reason: reason[1][part][0]))
