"""Opening what the user names (a file, a folder, a pattern, a hub id) and yielding its rows with file and line.

JSON lines are read by ourselves, line by line: memory stays bounded whatever the size, line numbers are the file's own, and a malformed
line costs that line. Tables and hub data sets stream through pyarrow and `datasets`.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from rlhf.data.examples import DOCUMENT_CHARS
from rlhf.errors import InputError
from rlhf.paths import from_home

SUFFIXES = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
WANTED_LINES = {  # where no line of a file can be read
    "lines": "an object a line; a file that is one array is named .json",
    "json": "objects: one array of them, or one after the other",
    "csv": "a header and rows with commas, semicolons or tabs between the cells",
    "text": "text in UTF-8",
}
TABLE_IN_AN_OBJECT = 'a whole table in one object, as pandas writes it: to_json(path, orient="records", lines=True) writes rows'
DESCRIPTIONS_OF_FOLDERS = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
OTHER_PACKERS = {".zst", ".bz2", ".xz", ".zip", ".7z", ".lz4"}
MAX_LINE_BYTES = 64 * 2**20  # a longer one is no row that a model could read, and would not fit the memory promised
CHUNK_BYTES = 2**20
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?P<part>(/[\w.-]+)*)(@(?P<split>[\w.-]+))?")
_LIST_CELLS = {"messages", "conversations", "conversation", "conversation_a", "conversation_b", "completions", "responses", "answers", "scores",
               "ranks", "history", "votes", "instances", "paragraphs", "passages", "preference"}
_MESSAGE_CELLS = {"prompt", "chosen", "rejected", "completion", "output"}


@dataclass(frozen=True)
class Drop:
    """A place that gave no row: the reason, and for people what exactly was met there."""

    reason: str
    detail: str = ""


Numbered = Iterator[tuple[int, "dict | Drop"]]


def read_rows(source: str, mapping: dict[str, str] | None = None, by_line: bool = False) -> Iterator[tuple[str, "dict | Drop"]]:
    """Rows of a source with where they stand (``file:line``; the number of the row in a Parquet file, on the hub, and where
    the rows of a JSON file share a line).

    ``mapping`` renames columns (wanted: found; a dot reaches into an object: ``meta.question``). A malformed line is yielded as a `Drop`.
    A text file gives its lines one by one if ``by_line``, else pieces of about 20,000 characters that end with a paragraph.
    InputError for a source that is missing, empty, unreadable or malformed throughout.
    """
    for part in parts_of(source):
        for line, row in read_part(part, by_line):
            yield f"{part}:{line}", renamed(row, mapping) if mapping and isinstance(row, dict) else row


def parts_of(source: str) -> list[str]:
    """The files or data sets of a source, in the order of their names."""
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"the source of the data is {source!r}; wanted a file, a folder, a pattern or a hub id")
    path = Path(from_home(source))
    if path.is_dir():
        return _files_in(path)
    if path.exists():
        return [str(path)]
    if glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise InputError(f"{source}: no file matches this pattern")
        return list(dict.fromkeys(part for name in found for part in parts_of(name)))  # `**` finds a folder, and again what is in it
    if _looks_like_hub_id(source):
        return [source]
    raise InputError(
        f"{source}: there is no such file or folder; give a path as seen from {Path.cwd()}, or a hub id such as OWNER/NAME@train"
    )


def files_of(part: str) -> list[str]:
    """The files that a part is read from: itself, or those of a data set that `datasets` saved, without what it caches there; none on the hub."""
    path = Path(part)
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    return [str(file) for file in inside if file.is_file() and not (path.is_dir() and file.name.startswith("cache-"))]


def _files_in(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise InputError(
            f"{folder}: a saved data set with the splits {', '.join(splits)}; name one of them, e.g. {folder}/{(splits or ['train'])[0]}"
        )
    if (folder / "state.json").exists():
        return [str(folder)]
    inside = [path for path in sorted(folder.rglob("*")) if not any(name.startswith(".") for name in path.relative_to(folder).parts)]
    for path in inside:
        if path.suffix.lower() in OTHER_PACKERS and _kind(path.with_suffix("")):
            raise InputError(f"{path}: packed in a way that is not read here; wanted plain files or .gz")
    files = [str(path) for path in inside if path.is_file() and _kind(path) and path.name not in DESCRIPTIONS_OF_FOLDERS]
    if not files:
        raise InputError(f"{folder}: no data files in this folder; wanted {', '.join(SUFFIXES)} (also .gz)")
    return files


def _looks_like_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith(".") and _kind(Path(source)) is None


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return SUFFIXES.get(suffix.lower())


def read_part(part: str, by_line: bool = False) -> Numbered:
    """Numbered rows of one file or data set; InputError if there is none, or none that can be read."""
    path = Path(part)
    if path.is_dir():
        rows = _saved_rows(part)
    elif not path.exists():
        rows = _hub_rows(part)
    else:
        rows = _file_rows(path, by_line)
    bad, first, good = 0, None, False
    for line, row in rows:
        if isinstance(row, Drop):
            bad, first = bad + 1, first or (line, row)
        good = good or not isinstance(row, Drop)
        yield line, row
    if first is not None and not good:
        (line, drop), unit = first, counted_in(part)
        raise InputError(f"{part}: none of its {bad:,} {unit}s can be read; {unit} {line}: {drop.reason}{drop.detail and f' ({drop.detail})'}; "
                         f"wanted {WANTED_LINES[_kind(path)]}")  # nothing else yields drops
    if not good:
        raise InputError(f"{part}: there is no row in it; wanted at least one")


def counted_in(part: str) -> str:
    """What the places of a part's rows are numbers of: "line", or "row" where a row has no line of its own."""
    path = Path(part)
    lines = path.is_file() and _kind(path) != "parquet" and not (_kind(path) == "json" and _layout(path) == "one line")
    return "line" if lines else "row"


def _file_rows(path: Path, by_line: bool) -> Numbered:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{path}: no kind of file that can be read here; wanted {', '.join(SUFFIXES)} (also .gz)")
    _check_start(path)
    if kind == "lines":
        return _json_lines(path)
    if kind == "json":
        return _json_file(path)
    if kind == "csv":
        return _table(path)
    if kind == "parquet":
        return _parquet(path)
    return _text_lines(path) if by_line else _text_pieces(path)


# Bytes and lines ----------------------------------------------------------------------------------------------------------------------


def _check_start(path: Path) -> None:
    """InputError for a file that is empty, UTF-16 or UTF-32, whatever its name says."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise InputError(f"{path}: the file is empty; wanted at least one row")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        found = "UTF-32" if start[2:] == b"\0\0" else "UTF-16"
        raise InputError(f"{path}: line 1: the file is {found}; wanted UTF-8: save it again with that encoding")


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked if it is gzip (seen from its first bytes, not from its name)."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if path.suffix == ".gz" and not packed:
        raise InputError(f"{path}: its name says gzip, its first bytes do not; rename it or fetch it again")
    return io.BufferedReader(gzip.open(path), CHUNK_BYTES) if packed else path.open("rb")


@contextmanager
def _damage_is_said(path: Path, line: list[int]) -> Iterator[None]:
    """Failures of the file become InputError with the number of the last line that could be read, ``line[0]``."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip file is cut short or damaged after line {line[0]} ({error}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read after line {line[0]} ({error.strerror})") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines of a file without a byte order mark; None for a line beyond the limit of length."""
    line = [0]
    with _damage_is_said(path, line), _open(path) as file:
        while content := file.readline(MAX_LINE_BYTES):
            line[0] += 1
            if line[0] == 1 and content.startswith(codecs.BOM_UTF8):
                content = content[len(codecs.BOM_UTF8) :]
            if len(content) < MAX_LINE_BYTES:
                yield line[0], content
                continue
            while content and not content.endswith(b"\n"):
                content = file.readline(MAX_LINE_BYTES)
            yield line[0], None


def _text_of(content: bytes | None) -> "str | Drop":
    if content is None:
        return Drop("line too long", f"over {MAX_LINE_BYTES // 2**20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Drop("not UTF-8", f"byte {error.start + 1} is {content[error.start]:#04x}")


# JSON ---------------------------------------------------------------------------------------------------------------------------------


class _RepeatedKey(ValueError):
    """An object names one key twice: whichever value were taken, the other would be lost in silence."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey("a key stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_BETWEEN_PARTS = re.compile(r"[\s,:]*")  # of an object


def _malformed(error: Exception) -> str:
    """What is wrong with a piece of JSON, in a few words and without a word of its content."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "brackets nested too deeply"
    return str(error) if isinstance(error, _RepeatedKey) else "a number of too many digits"


def _row_of(text: str) -> "dict | Drop":
    try:
        row = _DECODER.decode(text)
    except _RepeatedKey:
        return Drop("a key twice")
    except (ValueError, RecursionError) as error:
        return Drop("malformed JSON", _malformed(error))
    return _as_row(row)


def _as_row(value: object) -> "dict | Drop":
    """A value of JSON, if it is one row."""
    if not isinstance(value, dict):
        return Drop("not an object", f"a {type(value).__name__}")
    return Drop("not one row", TABLE_IN_AN_OBJECT) if _is_table(value) else value


def _is_table(value: dict) -> bool:
    """True for what pandas' to_json makes of a whole table: columns with a value for each number of a row, such rows, or both apart."""
    inside = list(value.values())
    if not inside or not all(isinstance(part, dict) for part in inside):
        return value.keys() == {"columns", "index", "data"}
    return all(_are_numbers(part) and part.keys() == inside[0].keys() for part in inside) or _are_numbers(value)


def _are_numbers(names: dict) -> bool:
    return bool(names) and all(name.isdecimal() for name in names)


def lines_of(part: str) -> Iterator[tuple[int, bytes | None]] | None:
    """The numbered lines of a part that holds JSON lines, not yet read as JSON (for `row_of_line`), without blank ones; None for any other part."""
    path = Path(part)
    if not path.is_file() or _kind(path) != "lines":
        return None
    return ((line, content) for line, content in _lines(path) if content is None or content.strip())


def row_of_line(content: bytes | None) -> "dict | Drop":
    """What stands on a line; None is a line beyond the limit of length."""
    text = _text_of(content)
    return _row_of(text) if isinstance(text, str) else text


def is_plain_text(part: str) -> bool:
    """True for text files, which give other rows when they are read line by line."""
    return Path(part).is_file() and _kind(Path(part)) == "text"


def _json_lines(path: Path) -> Numbered:
    for line, content in _lines(path):
        if content is None or content.strip():
            yield line, row_of_line(content)


def _json_file(path: Path) -> Numbered:
    """A ``.json`` file: one array of objects, objects one after the other, JSON lines, or one object that holds the array."""
    layout = _layout(path)
    if layout == "lines":
        return _json_lines(path)
    if layout == "one line":
        return ((number, row) for number, (_, row) in enumerate(_json_values(path), start=1))
    return _json_values(path)


def _layout(path: Path) -> str:
    """How a ``.json`` file is written: "lines" (an object a line), "one line" or "values" (on several lines). Looked at once as long as it stays."""
    now = path.stat()
    return _layout_of(path, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=64)
def _layout_of(path: Path, size: int, modified_ns: int) -> str:
    return "lines" if _begins_with_a_row(path) else "one line" if _share_a_line(path) else "values"


def _begins_with_a_row(path: Path) -> bool:
    """True where the first line is an object and none that holds the rows."""
    first = next((content for _, content in _lines(path) if content is None or content.strip()), None)
    row = row_of_line(first)
    return isinstance(row, dict) and not _holds_rows(row)


def _share_a_line(path: Path) -> bool:
    """True where the second row begins on the line of the first, as `json.dump` writes them: one place would name them all."""
    lines = [line for line, _ in islice(_json_values(path), 2)]
    return len(lines) > len(set(lines))


def _holds_rows(value: object) -> str | None:
    """The key that the rows stand under in an object such as {"data": [...]}, if it is one: no other list of objects stands beside them."""
    lists = [] if not isinstance(value, dict) else [
        key for key, inside in value.items() if isinstance(inside, list) and inside and all(isinstance(item, dict) for item in inside)]
    return lists[0] if len(lists) == 1 and lists[0] in ("data", "rows", "train", "examples") else None


def _held_rows(text: str, place: int, line: int, holder: str) -> Numbered:
    """The rows under this key of the object that begins at this place on this line; it was read before, so nothing in it is malformed."""
    start, key, inside = place, None, place + 1
    while key != holder:
        key, place = _DECODER.raw_decode(text, _BETWEEN_PARTS.match(text, inside).end())
        array = _BETWEEN_PARTS.match(text, place).end()
        _, inside = _DECODER.raw_decode(text, array)
    place = _BETWEEN_PARTS.match(text, array + 1).end()
    while text[place] != "]":
        line, start = line + text.count("\n", start, place), place
        row, place = _DECODER.raw_decode(text, place)
        yield line, _as_row(row)
        place = _BETWEEN_PARTS.match(text, place).end()


def _json_values(path: Path) -> Numbered:
    """Values of an array, or one after the other, read as they come; what is malformed ends the reading, for nothing after it is sure."""
    buffer, place, line, depth = "", 0, 1, 0
    chunks = _decoded_chunks(path)
    while True:
        skipped = _BETWEEN_VALUES.match(buffer, place).end()
        line, place = line + buffer.count("\n", place, skipped), skipped
        bracket = buffer[place : place + 1]
        if (bracket, depth) in (("[", 0), ("]", 1)):
            depth, place = depth + (1 if bracket == "[" else -1), place + 1
            continue
        try:
            value, end = _DECODER.raw_decode(buffer, place)
        except (ValueError, RecursionError) as error:
            more = next(chunks, None) if len(buffer) - place < MAX_LINE_BYTES else None
            if more is not None:
                buffer, place = buffer[place:] + more, 0
                continue
            if place == len(buffer) and depth == 0:
                return
            if len(buffer) - place >= MAX_LINE_BYTES and _is_cut(buffer, place, error):
                raise InputError(f"{path}: line {line}: one object of over {MAX_LINE_BYTES // 2**20} MiB; wanted one array of objects, without an "
                                 "object around it, or .jsonl: an object a line") from error
            at = line + (buffer.count("\n", place, error.pos) if isinstance(error, json.JSONDecodeError) else 0)
            raise InputError(
                f"{path}: line {at}: malformed JSON ({_malformed(error)}); wanted one array of objects, or .jsonl: an object a line"
            ) from error
        holder = _holds_rows(value) if depth == 0 else None
        if holder is not None:
            yield from _held_rows(buffer, place, line, holder)
        else:
            yield line, _as_row(value)
        line, place = line + buffer.count("\n", place, end), end


def _is_cut(buffer: str, place: int, error: Exception) -> bool:
    """True where the object that begins at this place is not wrong as far as the buffer reaches."""
    if buffer[place] != "{" or not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 10  # a word such as `false` may be cut


def _decoded_chunks(path: Path) -> Iterator[str]:
    """The text of a file in chunks that may end anywhere but within a character."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = [1]
    with _damage_is_said(path, line), _open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                at = line[0] + chunk.count(b"\n", 0, error.start)
                raise InputError(
                    f"{path}: line {at}: not UTF-8 (byte {chunk[error.start]:#04x}); save the file again with that encoding"
                ) from error
            line[0] += text.count("\n")
            yield text


# Tables -------------------------------------------------------------------------------------------------------------------------------


def _table(path: Path) -> Numbered:
    """A CSV or TSV file. Cells stay text: guessing types would turn the answer "7" into a number and "NA" into nothing."""
    csv.field_size_limit(MAX_LINE_BYTES)
    texts = _strict_texts(path)
    header, first_line = next(texts, ""), 2
    if header.strip().lower() in ("sep=;", "sep=,", "sep=\t"):  # for Excel alone
        header, first_line = next(texts, ""), 3
    if "\r" in header.rstrip("\r\n"):
        raise InputError(f"{path}: its lines end with CR alone, as on old Macs; save it again with LF or CRLF at their ends")
    tab = ".tsv" in path.suffixes or header.count("\t") > max(header.count(","), header.count(";"))
    delimiter = "\t" if tab else ";" if header.count(";") > header.count(",") else ","
    try:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, strict=True), [])]
    except csv.Error as error:
        raise InputError(f"{path}: line {first_line - 1}: the header is malformed ({error}); wanted the names of the columns") from error
    named = [name for name in names if name]  # pandas writes its index without a name, spreadsheets leave empty columns at the end
    if len(set(named)) < len(named) or not named:
        raise InputError(f"{path}: line {first_line - 1}: the header names a column twice or none at all: {', '.join(names[:20])}; "
                         "give every column a name of its own")
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + first_line
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            for at in range(line, max(line + 1, reader.line_num + first_line)):  # a quote that is not closed takes the lines after it along
                yield at, Drop("malformed CSV", str(error))
            continue
        if cells:
            yield line, _cells_row(names, cells)


def _strict_texts(path: Path) -> Iterator[str]:
    for line, content in _lines(path):
        text = _text_of(content)
        if isinstance(text, Drop):
            raise InputError(f"{path}: line {line}: {text.reason} ({text.detail}); wanted UTF-8: save the table again with that encoding")
        yield text


class _Cells(dict):
    """A row of a table: what the mapping finds in it is a cell still."""


def _cells_row(names: list[str], cells: list[str]) -> "_Cells | Drop":
    if len(cells) != len(names):
        return Drop("cells and columns differ in number", f"{len(cells)} cells, {len(names)} columns")
    return _Cells((name, _cell(name, cell)) for name, cell in zip(names, cells, strict=True))


def _cell(name: str, cell: str) -> object:
    """A cell as text; a list spelled in JSON under a name that wants a list, or messages under one that may have them, is that list."""
    if not (cell.startswith("[") and (name in _LIST_CELLS or name in _MESSAGE_CELLS)):
        return cell
    try:
        found = _DECODER.decode(cell)
    except (ValueError, RecursionError):
        return cell
    messages = found and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in found)
    return found if messages or name in _LIST_CELLS else cell


def _parquet(path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: a date that Python cannot tell
        raise InputError(f"{path}: not readable as Parquet after row {line} ({_short(error)}); write or fetch it again") from error


# Text ---------------------------------------------------------------------------------------------------------------------------------


def _text_lines(path: Path) -> Numbered:
    for line, content in _lines(path):
        text = _text_of(content)
        if isinstance(text, Drop):
            yield line, text
        elif text.strip():
            yield line, {"text": text.rstrip("\r\n")}


def _text_pieces(path: Path) -> Numbered:
    """Pieces that end with a paragraph; joined they are the file, line ends apart."""
    start, gathered, size = 1, [], 0
    for line, content in _lines(path):
        text = _text_of(content)
        if isinstance(text, Drop):
            yield line, text
            continue
        text = text.replace("\r\n", "\n")
        if not gathered:
            start = line
        gathered.append(text)
        size += len(text)
        if size >= DOCUMENT_CHARS and (not text.strip() or size >= 2 * DOCUMENT_CHARS):
            yield start, {"text": "".join(gathered)}
            gathered, size = [], 0
    if "".join(gathered).strip():
        yield start, {"text": "".join(gathered)}


# Saved and hub data sets --------------------------------------------------------------------------------------------------------------


def _saved_rows(folder: str) -> Numbered:
    """Rows of a data set that `datasets` saved to a folder; they are mapped into memory, not read."""
    import datasets

    try:
        yield from enumerate(datasets.load_from_disk(folder), start=1)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not readable as a saved data set ({_short(error)})") from error


def _hub_rows(source: str) -> Numbered:
    """Rows of OWNER/NAME[/PART][@SPLIT], streamed; PART is one of its configurations or folders, SPLIT is ``train`` if not said."""
    import datasets

    named = _HUB_ID.fullmatch(source)
    name, part, split = named["name"], named["part"].strip("/"), named["split"] or "train"
    try:
        choice = {}
        if part:
            choice = {"name": part} if part in datasets.get_dataset_config_names(name) else {"data_dir": part}
        yield from enumerate(datasets.load_dataset(name, split=split, streaming=True, **choice), start=1)
    except Exception as error:  # the hub's libraries raise dozens of kinds; each means that the named data cannot be had
        raise InputError(
            f"{source}: neither a file here nor a data set that the hub gives ({type(error).__name__}: {_short(error)}); "
            "check the path, or the id OWNER/NAME/PART@SPLIT and the network"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# Renaming -----------------------------------------------------------------------------------------------------------------------------


def renamed(row: dict, mapping: dict[str, str]) -> dict:
    """The row with the mapping's columns (wanted: found) under their wanted names; a wanted column without its source is absent."""
    pairs = {wanted: found for wanted, found in mapping.items() if wanted != "format"}
    kept = {name: value for name, value in row.items() if name not in pairs and name not in pairs.values()}
    for wanted, found in pairs.items():
        holder, name = _holder(row, found)
        if holder is not None:
            value = holder[name]
            kept[wanted] = _cell(wanted, value) if isinstance(holder, _Cells) and isinstance(value, str) else value
    return kept


def _holder(row: dict, found: str) -> tuple[dict | None, str]:
    """The object that has the named value, reached through dots where no column bears the whole name, and the value's name in it."""
    if found in row:
        return row, found
    *path, name = found.split(".")
    for step in path:
        row = row.get(step) if isinstance(row, dict) else None
    return (row, name) if isinstance(row, dict) and name in row else (None, name)
