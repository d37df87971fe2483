"""From a source of any schema to canonical rows, one at a time, with a report of what was made and of what was not, and where."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from rlhf.data.examples import TIED, Example, Unusable, demonstration_row, preference_row, prompt_row, text_row
from rlhf.data.formats import Format, check_kind, check_mapping, recognise
from rlhf.data.reading import Drop, Numbered, counted_in, parts_of, read_part, renamed
from rlhf.errors import InputError

HEAD_ROWS = 64  # rows looked at to recognise a schema
FOUND_CHARS = 60  # of what was met in a row
MAX_GROUP_ROWS = 10_000  # a column that names every row alike must not gather the whole file in memory

REPEATED = "prompt seen before"

REMEDIES = {  # for reasons that do not speak for themselves
    "unknown verdict": "a verdict is a or b, first or second, left or right, model_a or model_b, or tie; data/README.md has what other schemas take",
    "unknown role": "a role is system, user (human) or assistant (gpt)",
    "prompts differ": "where the answers are whole conversations, leave out the column of the prompt",
    "malformed CSV": "a cell that opens a quote and does not close it takes the lines after it along",
    "messages written as text": "write lists as JSON, not as str() or a string within JSON: Parquet, or to_json(orient='records', lines=True)",
}

Places = dict[str, dict[str, list[int]]]  # reason -> file -> lines
Group = tuple[list[int], list["dict | Drop"]]  # lines and their rows; a line that could not be read is a group of its own


@dataclass
class Report:
    """What a conversion read, made, dropped (whole rows) and left out (single completions); filled while the rows are iterated."""

    source: str
    kind: str
    formats: dict[str, Format] = field(default_factory=dict)  # by file
    counted_in: dict[str, str] = field(default_factory=dict)  # by file, what places are numbers of: "line" or "row"
    read: int = 0
    made: int = 0
    dropped: Places = field(default_factory=dict)
    left_out: Places = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)  # reason -> what was met the first time, where that was said
    unread: dict[str, bool] = field(default_factory=dict)  # columns that the schemas do not read -> whether they hold text of several words
    turns: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    documents_cut: int = 0
    voted: int = 0  # rows that several people judged, tied ones too
    votes_agree: float = 0.0  # the sum over them of the share of their pairs of votes that say the same

    def drops(self) -> dict[str, int]:
        """How many places were dropped for each reason, the most frequent first."""
        counts = Counter({reason: sum(map(len, files.values())) for reason, files in self.dropped.items()})
        return dict(counts.most_common())

    def describe(self) -> str:
        """One line for people: schema, rows, turns, what was made and what was dropped."""
        names = " and ".join(dict.fromkeys(form.name for form in self.formats.values()))
        parts = [f"{names}, {self.read:,} rows"]
        if self.turns:
            parts.append(f"{_range(self.turns)} turn{'s' * (max(self.turns) > 1)}")
        if len(self.answers) > 1 or max(self.answers, default=2) > 2:
            parts.append(f"{_range(self.answers)} answers each")
        drops = "".join(f", {reason} {count:,}" for reason, count in self.drops().items())
        dropped = f"; {sum(self.drops().values()):,} dropped: {drops[2:]}" if drops else ""
        cut = f"; {self.documents_cut:,} long documents cut into pieces" if self.documents_cut else ""
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{', '.join(parts)}: {self.made:,} rows of {self.kind}{cut}{dropped}{unread}"

    def as_json(self) -> dict:
        """The report as it stands in ``drops.json``: every dropped row by reason with file and line."""
        return {
            "source": self.source,
            "kind": self.kind,
            "formats": {part: {"name": form.name, "describe": form.describe} for part, form in self.formats.items()},
            "read": self.read,
            "made": self.made,
            "documents_cut": self.documents_cut,
            "columns_not_read": list(self.unread),
            "dropped": _counted(self.dropped),
            "left_out": _counted(self.left_out),
        }

    def drop(self, reason: str, part: str, line: int, found: str = "") -> None:
        """Notes a row that cannot be used, and, of the first for a reason, what was met there."""
        if found and reason not in self.dropped:
            self.found[reason] = found if len(found) <= FOUND_CHARS else found[:FOUND_CHARS] + "..."
        _note(self.dropped, reason, part, line)

    def place(self, part: str, line: int) -> str:
        """A place of the source for people; the file is named where there are several."""
        return f"{self.counted_in.get(part, 'line')} {line}" if part == self.source else f"{part}:{line}"

    def count(self, row: dict) -> None:
        self.made += 1
        if "prompt" in row:
            self.turns[len(row["prompt"]) + (self.kind != "prompts")] += 1
        if "completions" in row:
            self.answers[len(row["completions"])] += 1

    def count_votes(self, votes: list[int]) -> None:
        """Notes how far the votes on a row agree; one vote has none to agree with."""
        if len(votes) > 1:
            self.voted += 1
            self.votes_agree += sum(n * (n - 1) for n in Counter(votes).values()) / (len(votes) * (len(votes) - 1))

    def add(self, later: "Report") -> None:
        """Takes in the counts and places of a report on the rows that follow."""
        self.read, self.made, self.documents_cut = self.read + later.read, self.made + later.made, self.documents_cut + later.documents_cut
        self.voted, self.votes_agree = self.voted + later.voted, self.votes_agree + later.votes_agree
        self.turns.update(later.turns)
        self.answers.update(later.answers)
        self.found = later.found | self.found
        for places, more in ((self.dropped, later.dropped), (self.left_out, later.left_out)):
            for reason, files in more.items():
                for part, lines in files.items():
                    places.setdefault(reason, {}).setdefault(part, []).extend(lines)


@dataclass
class Part:
    """One file or data set of a source: its schema and its numbered rows, to be read once."""

    name: str
    form: Format
    rows: Numbered


@dataclass
class Converted:
    """Canonical rows, made while they are iterated (once), and the report that this fills."""

    rows: Iterator[dict]
    report: Report


def convert(source: str, kind: str, mapping: dict[str, str] | None = None, *, keep_ties: bool = False) -> Converted:
    """Canonical rows of a source (file, folder, pattern or hub id) as a kind: preferences, demonstrations, prompts or text.

    ``mapping`` renames columns (wanted: found) and may name the schema (``format``). Rows whose answers are all tied are dropped unless
    ``keep_ties``. Each row carries ``id`` (of its prompt) and ``source`` (``file:line``); equal prompts of kind prompts come once.
    InputError: at once if the first file is missing, empty or of no known schema; while iterating for later ones, or if no row was usable.
    """
    check_kind(kind)
    check_mapping(mapping, source)
    report = Report(source, kind)
    parts = parts_of(source)
    first = open_part(parts[0], kind, mapping, report)
    later = (open_part(part, kind, mapping, report) for part in parts[1:])
    return Converted(_rows(chain([first], later), kind, report, keep_ties), report)


def open_part(name: str, kind: str, mapping: dict[str, str] | None, report: Report) -> Part:
    """One file or data set of a source with its schema, which the report then knows. InputError if there is none for the kind."""
    numbered = read_part(name, by_line=kind == "prompts")
    if mapping:
        numbered = ((line, renamed(row, mapping) if isinstance(row, dict) else row) for line, row in numbered)
    head, good = [], 0
    for line, row in numbered:
        head.append((line, row))
        good += isinstance(row, dict)
        if good and len(head) >= HEAD_ROWS:
            break
    form = recognise([row for _, row in head if isinstance(row, dict)], kind, mapping, name)
    report.formats[name], report.counted_in[name] = form, counted_in(name)
    report.unread |= _unread(form, [row for _, row in head if isinstance(row, dict)])
    return Part(name, form, chain(head, numbered))


class _Watched(dict):
    """A row that remembers which of its columns were looked at."""

    def __init__(self, row: dict, seen: set):
        super().__init__(row)
        self.seen = seen

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.seen.add(name)
        return super().get(name, default)

    def items(self):
        self.seen.update(self)
        return super().items()


def _unread(form: Format, rows: list[dict]) -> dict[str, bool]:
    """Columns that a schema does not look at in any of a file's first rows, and whether they hold text of several words."""
    if form.group:
        return {}
    seen: set[str] = set()
    for row in rows:
        with contextlib.suppress(Unusable):
            list(form.read(_Watched(row, seen)))
    unread = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row) if name not in seen}
    return {name or "(a column without a name)": any(isinstance(value, str) and len(value.split()) > 2 for value in values)
            for name, values in unread.items()}


def _rows(parts: Iterable[Part], kind: str, report: Report, keep_ties: bool) -> Iterator[dict]:
    prompts_seen: set[bytes] = set()
    for part in parts:
        examples = examples_of(part.form, groups_of(_counted_rows(part.rows, report), part.form.group))
        for line, row in rows_of(examples, part.name, kind, report, keep_ties):
            if kind == "prompts":
                key = prompt_key(row)
                if key in prompts_seen:
                    report.drop(REPEATED, part.name, line)
                    continue
                prompts_seen.add(key)
            report.count(row)
            yield row
    refuse_nothing(report)


def _counted_rows(rows: Numbered, report: Report) -> Numbered:
    for numbered in rows:
        report.read += 1
        yield numbered


def groups_of(rows: Numbered, column: str | None) -> Iterator[Group]:
    """Rows that belong together with their lines: one by one, or neighbours that share the value of a schema's group column."""
    lines: list[int] = []
    rows_together: list[dict] = []
    for line, row in rows:
        if isinstance(row, Drop):
            yield [line], [row]
            continue
        if rows_together and _ends_group(rows_together, row, column):
            yield lines, rows_together
            lines, rows_together = [], []
        lines.append(line)
        rows_together.append(row)
    if rows_together:
        yield lines, rows_together


def _ends_group(rows: list[dict], row: dict, column: str | None) -> bool:
    return column is None or row.get(column) != rows[-1].get(column) or len(rows) >= MAX_GROUP_ROWS


def examples_of(form: Format, groups: Iterable[Group]) -> Iterator[tuple[int, Example | Unusable]]:
    """Examples with their lines; what cannot even be read as an example comes as the reason why."""
    for lines, rows in groups:
        if isinstance(rows[0], Drop):
            yield lines[0], Unusable(rows[0].reason, found=rows[0].detail)
            continue
        try:
            for example in form.read(rows if form.group else rows[0]):
                yield lines[example.at], example
        except Unusable as why:
            yield lines[why.at], why


def rows_of(examples: Iterable[tuple[int, Example | Unusable]], part: str, kind: str, report: Report, keep_ties: bool) -> Iterator[tuple[int, dict]]:
    """Canonical rows with their lines, not yet counted; what cannot be used goes into the report."""
    make = {"preferences": partial(preference_row, keep_ties=keep_ties), "demonstrations": demonstration_row, "prompts": prompt_row,
            "text": text_row}[kind]
    for line, example in examples:
        try:
            if isinstance(example, Unusable):
                raise example
            made = make(example)
        except Unusable as why:
            report.drop(why.reason, part, line, why.found)
            if why.reason == TIED and isinstance(example, Example):
                report.count_votes(example.votes)
            continue
        report.count_votes(example.votes)
        for reason in made.left_out:
            _note(report.left_out, reason, part, line)
        report.documents_cut += len(made.rows) > 1
        for row in made.rows:
            row["source"] = f"{part}:{line}"
            yield line, row


def prompt_key(row: dict) -> bytes:
    """64 bits that name a prompt with all its turns, exactly as it is written."""
    turns = (part for turn in row["prompt"] for part in (turn["role"], turn["content"]))
    return hashlib.blake2b("\0".join(turns).encode(), digest_size=8).digest()  # no text that got here has a NUL in it


def _note(places: Places, reason: str, part: str, line: int) -> None:
    places.setdefault(reason, {}).setdefault(part, []).append(line)


def _counted(places: Places) -> dict:
    return {reason: {"rows": sum(map(len, files.values())), "where": files} for reason, files in places.items()}


def _range(counts: Counter[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def refuse_nothing(report: Report) -> None:
    """InputError if a whole source gave no row."""
    if report.made == 0:
        raise InputError(_nothing_made(report))


def _found(report: Report, reason: str) -> str:
    return f" ({report.found[reason]})" if reason in report.found else ""


def _nothing_made(report: Report) -> str:
    drops = report.drops()
    reasons = ", ".join(f"{reason} {count:,}{_found(report, reason)}" for reason, count in drops.items())
    remedies = "".join(f"{REMEDIES[reason]}; " for reason in drops if reason in REMEDIES)
    part, lines = next(iter(next(iter(report.dropped.values())).items())) if report.dropped else (report.source, [1])
    names = " and ".join(dict.fromkeys(form.name for form in report.formats.values()))
    return (
        f"{part}: {report.counted_in.get(part, 'line')} {lines[0]}: none of the {report.read:,} rows of {report.source} (read as {names}) "
        f"can be used as {report.kind}: {reasons}; {remedies}"
        "correct them, or say in the config's mapping which column is which"
    )
