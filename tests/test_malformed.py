"""Malformed files through `rlhf prepare`: a clean run in which the bad row is counted in drops.json and nothing else changes, or exit code 2
with file and line. Never a traceback, never a row that was changed in silence."""

import gzip
import io
import json
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from rlhf.cli import main
from rlhf.encoding import ASSISTANT, END, PAD, SYSTEM, USER
from rlhf.jsonl import read_jsonl
from tests.helpers import tiny_encoder
from tests.test_data_formats import DROPPED, GOOD_HH, GOOD_PAIR, GOOD_RANKED, HH, REFUSED, assistant, user

LINE = json.dumps(GOOD_PAIR).encode()
MADE = ([user("Good?")], ["good", "bad"])
LONG = 10 * 2**20  # bytes
GOOD_SCORED = {"prompt": "Good?", "completions": ["good", "bad"], "scores": [2, 1]}


def pair(**changes):
    return json.dumps({**GOOD_PAIR, **changes}).encode()


def raw(chosen: bytes) -> bytes:
    """A line with these bytes as the chosen answer."""
    return b'{"prompt": "Good?", "chosen": ' + chosen + b', "rejected": "bad"}'


# Lines that give no row -----------------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "cut after the key": ("malformed JSON", b'{"prompt":'),
    "cut inside a string": ("malformed JSON", LINE[:20]),
    "cut before the last brace": ("malformed JSON", LINE[:-1]),
    "a comma too many": ("malformed JSON", LINE[:-1] + b",}"),
    "a comma too few": ("malformed JSON", LINE.replace(b", ", b" ")),
    "a brace too many": ("malformed JSON", LINE + b"}"),
    "two objects": ("malformed JSON", LINE + LINE),
    "two objects and a comma": ("malformed JSON", LINE + b"," + LINE),
    "a comma behind": ("malformed JSON", LINE + b","),
    "single quotes": ("malformed JSON", LINE.replace(b'"', b"'")),
    "no quotes": ("malformed JSON", LINE.replace(b'"', b"")),
    "a comment": ("malformed JSON", b"// " + LINE),
    "a comment behind": ("malformed JSON", LINE + b" # good"),
    "plain words": ("malformed JSON", b"Good? good, not bad"),
    "Python's None": ("malformed JSON", raw(b"None")),
    "Python's True": ("malformed JSON", raw(b"True")),
    "a raw tab in a string": ("malformed JSON", raw(b'"go\tod"')),
    "a raw NUL in a string": ("malformed JSON", raw(b'"go\x00od"')),
    "a raw escape in a string": ("malformed JSON", raw(b'"\x1b[31mgood"')),
    "an unknown escape": ("malformed JSON", raw(rb'"go\xod"')),
    "an escape cut short": ("malformed JSON", raw(rb'"\u12"')),
    "a number with two points": ("malformed JSON", raw(b"1.2.3")),
    "a number that starts with 0": ("malformed JSON", raw(b"012")),
    "a hexadecimal number": ("malformed JSON", raw(b"0x1F")),
    "an int of 6,000 digits": ("malformed JSON", raw(b"9" * 6000)),
    "100,000 open brackets": ("malformed JSON", b"[" * 100_000),
    "100,000 nested lists": ("malformed JSON", raw(b"[" * 100_000 + b"]" * 100_000)),
    "100,000 nested objects": ("malformed JSON", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "NULs alone": ("malformed JSON", b"\x00" * 50),
    "a byte order mark inside": ("malformed JSON", b"\xef\xbb\xbf" + LINE),
    "an HTML page": ("malformed JSON", b"<!DOCTYPE html><html>429 Too Many Requests</html>"),
    "a marker of git": ("malformed JSON", b"<<<<<<< HEAD"),
    "a CSV line": ("malformed JSON", b'"Good?","good","bad"'),
    "10 MB of an open string": ("malformed JSON", b'{"prompt": "' + b"x" * LONG),
    "10 MB of words": ("malformed JSON", b"word " * (LONG // 5)),
    "a list": ("not an object", b"[" + LINE + b"]"),
    "an empty list": ("not an object", b"[]"),
    "a string": ("not an object", b'"Good?"'),
    "a number": ("not an object", b"17"),
    "NaN": ("not an object", b"NaN"),
    "null": ("not an object", b"null"),
    "true": ("not an object", b"true"),
    "10 MB of a string": ("not an object", b'"' + b"x" * LONG + b'"'),
    "latin-1": ("not UTF-8", raw('"café"'.encode("latin-1"))),
    "cp1252 quotes": ("not UTF-8", raw(b'"\x93good\x94"')),
    "GBK": ("not UTF-8", raw('"你好"'.encode("gbk"))),
    "Shift-JIS": ("not UTF-8", raw('"こんにちは"'.encode("shift-jis"))),
    "a lone continuation byte": ("not UTF-8", raw(b'"\x80"')),
    "a character cut short": ("not UTF-8", raw(b'"' + "好".encode()[:2] + b'"')),
    "an overlong slash": ("not UTF-8", raw(b'"\xc0\xaf"')),
    "half a surrogate pair as bytes": ("not UTF-8", raw(b'"\xed\xa0\x80"')),
    "a code point beyond Unicode": ("not UTF-8", raw(b'"\xf5\x80\x80\x80"')),
    "bytes FF FE": ("not UTF-8", b"\xff\xfe" + LINE),
    "a key twice": ("a key twice", LINE[:-1] + b', "chosen": "better"}'),
    "a key twice with one value": ("a key twice", LINE[:-1] + b', "rejected": "bad"}'),
    "a key twice deep inside": ("a key twice", LINE[:-1] + b', "meta": [{"a": {"b": 1, "b": 2}}]}'),
    "a key twice, once escaped": ("a key twice", LINE[:-1] + rb', "\u0063hosen": "better"}'),
    "an empty object": ("no prompt", b"{}"),
    "other columns": ("no prompt", b'{"question_id": 1, "score": 2}'),
}

# Rows that no training could use (beside those of tests/test_data_formats.py) -------------------------------------------------------------

BAD_ROWS = {
    "NUL in the prompt": ("NUL character", GOOD_PAIR, {"prompt": "Go\x00od?"}),
    "NUL in the rejected answer": ("NUL character", GOOD_PAIR, {"rejected": "\x00"}),
    "half a surrogate pair in the prompt": ("not valid Unicode", GOOD_PAIR, {"prompt": "\udc00?"}),
    "halves of a surrogate pair the wrong way round": ("not valid Unicode", GOOD_PAIR, {"chosen": "\ude00\ud83d"}),
    "white space of all kinds": ("empty completion", GOOD_PAIR, {"chosen": " \t\r\n\u3000\u2003"}),
    "answers that differ in white space": ("chosen equals rejected", GOOD_PAIR, {"chosen": "\nbad\u3000"}),
    "a list of texts as an answer": ("not a list of messages", GOOD_PAIR, {"rejected": ["bad", "worse"]}),
    "an object as an answer": ("unknown role", GOOD_PAIR, {"chosen": {"text": "good"}}),
    "an object as the prompt": ("unknown role", GOOD_PAIR, {"prompt": {"text": "Good?"}}),
    "a number with a fraction as an answer": ("not text", GOOD_PAIR, {"chosen": 1.5}),
    "NaN as an answer": ("not text", GOOD_PAIR, {"chosen": float("nan")}),
    "a huge int as an answer": ("not text", GOOD_PAIR, {"chosen": 10**4000}),
    "a huge int as margin": ("margin is not a number", GOOD_PAIR, {"margin": 10**400}),
    "NaN as margin": ("margin is not a number", GOOD_PAIR, {"margin": float("nan")}),
    "an infinite margin in words": ("margin is not a number", GOOD_PAIR, {"margin": "inf"}),
    "a list as margin": ("margin is not a number", GOOD_PAIR, {"margin": [1]}),
    "a number as the system turn": ("not text", GOOD_PAIR, {"system": 7}),
    "text as history": ("not a list of messages", GOOD_PAIR, {"history": "Hi"}),
    "history of single turns": ("not a list of messages", GOOD_PAIR, {"history": [["Hi"]]}),
    "history of numbers": ("not a list of messages", GOOD_PAIR, {"history": [1, 2]}),
    "content that is a list": ("not text", GOOD_PAIR, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Good?"}]}]}),
    "content that is missing": ("no prompt", GOOD_PAIR, {"prompt": [{"role": "user"}]}),
    "a role that is a number": ("unknown role", GOOD_PAIR, {"prompt": [{"role": 1, "content": "Good?"}]}),
    "a role that is missing": ("unknown role", GOOD_PAIR, {"prompt": [{"content": "Good?"}]}),
    "other turns before the answers": ("prompts differ", GOOD_PAIR, {"rejected": [user("Better?"), assistant("bad")]}),
    "an answer that is the user's": ("does not end with the assistant", GOOD_PAIR, {"rejected": [user("bad")]}),
    "transcripts that differ in an early turn": ("prompts differ", GOOD_HH, {"chosen": HH + " good", "rejected": HH.replace("Yes?", "No?") + " bad"}),
    "transcripts of different length": ("prompts differ", GOOD_HH, {"chosen": HH + " good", "rejected": "\n\nHuman: Hi?\n\nAssistant: bad"}),
    "a transcript without a person": ("not a transcript", GOOD_HH, {"chosen": "\n\nAssistant: good"}),
    "an empty transcript": ("not a transcript", GOOD_HH, {"rejected": ""}),
    "ranks with a gap": ("ranks have gaps", GOOD_RANKED, {"completions": ["a", "b", "c"], "ranks": [1, 2, 4]}),
    "ranks that start at 2": ("ranks have gaps", GOOD_RANKED, {"ranks": [2, 3]}),
    "ranks below zero": ("ranks have gaps", GOOD_RANKED, {"ranks": [-1, 0]}),
    "a gap after a tie": ("ranks have gaps", GOOD_RANKED, {"completions": ["a", "b", "c"], "ranks": [1, 1, 4]}),
    "a huge rank": ("ranks have gaps", GOOD_RANKED, {"ranks": [1, 10**15]}),
    "a rank that is missing": ("answers and ranks differ in number", GOOD_RANKED, {"ranks": [1]}),
    "a rank that is null": ("rank is not a number", GOOD_RANKED, {"ranks": [1, None]}),
    "a rank that is a list": ("rank is not a number", GOOD_RANKED, {"ranks": [1, [2]]}),
    "ranks that are true and false": ("rank is not a number", GOOD_RANKED, {"ranks": [True, False]}),
    "an infinite rank": ("rank is not a number", GOOD_RANKED, {"ranks": [1, float("inf")]}),
    "ranks as one text": ("not a list of answers", GOOD_RANKED, {"ranks": "1, 2"}),
    "ranks as an object": ("not a list of answers", GOOD_RANKED, {"ranks": {"a": 1, "b": 2}}),
    "answers as an object": ("not a list of answers", GOOD_RANKED, {"completions": {"a": 1, "b": 2}}),
    "no answers": ("fewer than two answers", GOOD_RANKED, {"completions": [], "ranks": []}),
    "answers that are lists": ("not text", GOOD_RANKED, {"completions": [["a"], ["b"]]}),
    "answers that are all the same": ("same answer twice", GOOD_RANKED, {"completions": ["a", "a ", " a"], "ranks": [1, 2, 3]}),
    "a score that is NaN": ("score is not a number", GOOD_SCORED, {"scores": [float("nan"), 1]}),
    "scores that are all NaN": ("score is not a number", GOOD_SCORED, {"scores": [float("nan"), float("nan")]}),
    "a score below all numbers": ("score is not a number", GOOD_SCORED, {"scores": [1, float("-inf")]}),
    "a score in words": ("score is not a number", GOOD_SCORED, {"scores": [1, "high"]}),
    "a huge int as score": ("score is not a number", GOOD_SCORED, {"scores": [1, 10**400]}),
    "a score too few": ("answers and ranks differ in number", GOOD_SCORED, {"scores": [1]}),
    "scores that are all equal": ("all tied", GOOD_SCORED, {"scores": [1, 1.0]}),
}

# Files that look odd and are fine: every row goes in as it is -----------------------------------------------------------------------------

MARKS = "".join((USER, ASSISTANT, SYSTEM, END, PAD, "<|im_start|>system\n", "<|im_end|>", "<|endoftext|>", "</s>", "[INST]"))
ODD = {
    "a byte order mark": (b"\xef\xbb\xbf" + LINE + b"\n", [MADE]),
    "CRLF": (LINE + b"\r\n" + LINE + b"\r\n", [MADE, MADE]),
    "CRLF and LF in turn": (LINE + b"\r\n" + LINE + b"\n", [MADE, MADE]),
    "no line end at the end": (LINE + b"\n" + LINE, [MADE, MADE]),
    "blank lines": (b"\n\r\n  \n" + LINE + b"\n\n\t\n" + LINE + b"\n\n", [MADE, MADE]),
    "spaces around": (b"   " + LINE + b" \t\n", [MADE]),
    "separators of lines that JSON does not know": (pair(chosen="one\u2028two\u2029three\x85four\x0bfive") + b"\n",
                                                    [(MADE[0], ["one\u2028two\u2029three\x85four\x0bfive", "bad"])]),
    "the same unescaped": (json.dumps({**GOOD_PAIR, "chosen": "one\u2028two\x85three"}, ensure_ascii=False).encode() + b"\n",
                           [(MADE[0], ["one\u2028two\x85three", "bad"])]),
    "markers of a template in the prompt": (pair(prompt=f"Hi{MARKS}Sure") + b"\n", [([user(f"Hi{MARKS}Sure")], ["good", "bad"])]),
    "markers of a template in an answer": (pair(chosen=MARKS) + b"\n", [(MADE[0], [MARKS, "bad"])]),
    "markers of a transcript in a prompt": (pair(prompt="Hi\n\nAssistant: no\n\nHuman: yes") + b"\n",
                                            [([user("Hi\n\nAssistant: no\n\nHuman: yes")], ["good", "bad"])]),
    "control characters": (pair(chosen="\x1b[31mred\x07\x7f\u202e") + b"\n", [(MADE[0], ["\x1b[31mred\x07\x7f\u202e", "bad"])]),
    "a prompt of 10 MB": (pair(prompt="x" * LONG) + b"\n", [([user("x" * LONG)], ["good", "bad"])]),
    "a column of 10 MB that nobody wants": (pair(meta="x" * LONG) + b"\n", [MADE]),
    "a column that is nested 300 deep": (LINE[:-1] + b', "meta": ' + b"[" * 300 + b"]" * 300 + b"}\n", [MADE]),
    "a huge int and NaN in other columns": (pair(votes_up=10**4000, weight=float("nan")) + b"\n", [MADE]),
    "white space around answers": (pair(chosen=" good\n") + b"\n", [(MADE[0], [" good\n", "bad"])]),
    "characters that look alike": (pair(chosen="\u0430", rejected="a") + b"\n", [(MADE[0], ["\u0430", "a"])]),
    "one character in two spellings": (pair(chosen="e\u0301", rejected="\u00e9") + b"\n", [(MADE[0], ["e\u0301", "\u00e9"])]),
    "emoji of several code points": (pair(chosen="👩‍👩‍👧🏽", rejected="👩") + b"\n", [(MADE[0], ["👩‍👩‍👧🏽", "👩"])]),
    "private and unassigned characters": (pair(chosen="\ue000\ufffe\U0010ffff") + b"\n", [(MADE[0], ["\ue000\ufffe\U0010ffff", "bad"])]),
}


# Whole files that are refused (beside those of tests/test_data_formats.py) ----------------------------------------------------------------


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    return buffer.getvalue()


def as_parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


LINES = (LINE + b"\n") * 50
PACKED, TABLE = gzip.compress(LINES), as_parquet(prompt=["Good?"] * 9, chosen=["good"] * 9, rejected=["bad"] * 9)
WRONG_SUM = PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:]
BAD_FILES = {
    "header-of-gzip.jsonl.gz": (PACKED[:10], "damaged after line 0"),
    "half.jsonl.gz": (PACKED[: len(PACKED) // 2], "damaged after line"),
    "no-sum.jsonl.gz": (PACKED[:-8], "damaged after line"),
    "wrong-sum.jsonl.gz": (WRONG_SUM, "damaged after line"),
    "tail.jsonl.gz": (PACKED + b"tail", "damaged after line"),
    "twice.jsonl.gz": (gzip.compress(PACKED), "line 1: not UTF-8"),
    "nothing.jsonl.gz": (gzip.compress(b""), "no row"),
    "zip.jsonl.gz": (zipped(LINES), "its name says gzip"),
    "zip.jsonl": (zipped(LINES), "line 1"),
    "one-bracket.json": (b"[", "line 1: malformed JSON"),
    "cut.json": (b"[" + LINE + b",\n" + LINE[:30], "line 2: malformed JSON"),
    "texts.json": (b'["Good?",\n "good"]', "line 1: not an object"),
    "number.json": (b"3.14", "line 1: not an object"),
    "garbage-behind.json": (b"[" + LINE + b"]\n% the end", "line 2: malformed JSON"),
    "key-twice.json": (b"[" + LINE + b',\n{"prompt": "a", "prompt": "b"}]', "line 2: malformed JSON (a key stands twice"),
    "deep.json": (b"[" * 50_000 + b"]" * 50_000, "line 1: malformed JSON"),
    "digits.json": (b'[{"prompt": ' + b"9" * 6000 + b"}]", "line 1: malformed JSON"),
    "utf32.jsonl": (LINES.decode().encode("utf-32"), "line 1: the file is UTF-32"),
    "utf16-without-mark.jsonl": (LINES.decode().encode("utf-16-le"), "line 1"),
    "utf16-without-mark.csv": ("prompt,chosen,rejected\na,b,c\n".encode("utf-16-le"), "Columns found"),
    "nul.jsonl": (b"\x00" * 4096, "line 1: malformed JSON"),
    "ten-mb-of-nul.jsonl": (b"\x00" * LONG, "line 1: malformed JSON"),
    "other-columns.jsonl": (b'{"a": 1}\n', "Columns found: a"),
    "all-tied.jsonl": (json.dumps({**GOOD_RANKED, "ranks": [1, 1]}).encode(), "line 1: none of the 1 rows"),
    "all-empty.jsonl": (pair(chosen="") + b"\n" + pair(rejected=" ") + b"\n", "line 1: none of the 2 rows"),
    "a-nul.csv": (b"prompt,chosen,rejected\na,b\x00,c\n", "line 2: none of the 1 rows"),
    "ragged.csv": (b"prompt,chosen,rejected\na,b\n", "line 2: cells and columns differ in number"),
    "open-quote.csv": (b'prompt,chosen,rejected\na,"b,c\n', "line 2: malformed CSV"),
    "no-names.csv": (b",,\na,b,c\n", "line 1: the header names a column twice or none at all"),
    "latin1-header.csv": ("prömpt,chosen,rejected\na,b,c\n".encode("latin-1"), "line 1: not UTF-8"),
    "half.parquet": (TABLE[: len(TABLE) // 2], "not readable as Parquet"),
    "hole.parquet": (TABLE[:40] + b"\x00" * 60 + TABLE[100:], "as Parquet"),
    "no-rows.parquet": (as_parquet(prompt=pyarrow.array([], pyarrow.string())), "no row"),
    "numbers.parquet": (as_parquet(prompt=[1, 2], chosen=[3, 4], rejected=[5, 6]), "1: none of the 2 rows"),
    "bytes.parquet": (as_parquet(prompt=[b"\xff"], chosen=[b"a"], rejected=[b"b"]), "1: none of the 1 rows"),
    "words.parquet": (LINES, "not readable as Parquet"),
    "words.arrow": (LINES, "no kind of file"),
    "packed.jsonl.zst": (b"(\xb5/\xfd", "no kind of file"),
}


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs `rlhf prepare` on a file of preferences; returns exit code, message, made preferences and the first report of drops.json."""
    def run(path):
        words = [f"run.dir={tmp_path / 'run'}", f"data.preferences={path}", "data.eval_fraction=0", "data.test_fraction=0"]
        code = main(["prepare", "--config", "configs/tiny.yaml", "--quiet", *words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        data = tmp_path / "run" / "data"
        if code:
            assert code == 2 and said.err.startswith("error: ") and str(path) in said.err
            assert not list(data.rglob("*.jsonl")) and not (tmp_path / "run" / "prepare" / "DONE").exists()
            return code, said.err, None, None
        report = json.loads((data / "drops.json").read_text())[0]
        assert report["read"] == report["made"] + sum(places["rows"] for places in report["dropped"].values())
        rows = list(read_jsonl(data / "preferences" / "train.jsonl"))
        assert len(rows) == report["made"]
        return code, said.out, [(row["prompt"], row["completions"]) for row in rows], report
    return run


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_costs_that_line(tmp_path, prepare, name):
    reason, line = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([LINE, LINE, line, LINE]))
    code, _, made, report = prepare(path)
    assert (code, made) == (0, [MADE] * 3)
    assert report["dropped"] == {reason: {"rows": 1, "where": {str(path): [3]}}}


@pytest.mark.parametrize(("reason", "good", "change"), [*DROPPED, *BAD_ROWS.values()],
                         ids=[*(f"{n}-{case[0]}" for n, case in enumerate(DROPPED)), *BAD_ROWS])
def test_a_bad_row_costs_that_row(tmp_path, prepare, reason, good, change):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change}, good)))
    code, _, made, report = prepare(path)
    assert code == 0 and len(made) == 2 and made[0] == made[1]
    assert report["dropped"] == {reason: {"rows": 1, "where": {str(path): [2]}}}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_odd_and_is_fine_goes_in_unchanged(tmp_path, prepare, name):
    content, wanted = ODD[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    code, _, made, report = prepare(path)
    assert code == 0 and made == wanted and report["dropped"] == {}


@pytest.mark.parametrize("name", [*BAD_FILES, *REFUSED])
def test_a_bad_file_ends_with_2_and_says_where(tmp_path, prepare, name):
    content, message = (BAD_FILES | REFUSED)[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, said, _, _ = prepare(path)
    assert code == 2 and message in said


def test_there_are_at_least_150_of_them():
    assert len(BAD_LINES) + len(DROPPED) + len(BAD_ROWS) + len(BAD_FILES) + len(REFUSED) >= 150


@pytest.mark.parametrize("text", [f"Hi{MARKS}Sure, here is", f"{END}{USER}And now?{ASSISTANT}"])
def test_markers_in_a_row_do_not_forge_a_turn_once_encoded(tmp_path, prepare, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pair(prompt=text, chosen=text) + b"\n")
    [(prompt, completions)] = prepare(path)[2]
    encoder = tiny_encoder()
    special = set(encoder.tokenizer.all_special_ids)
    mark = encoder.tokenizer.convert_tokens_to_ids
    assert [i for i in encoder.prompt_ids(prompt) if i in special] == [mark(USER), mark(ASSISTANT)]
    assert [i for i in encoder.completion_ids(completions[0]) if i in special] == [encoder.eos_id]
    assert encoder.decode(encoder.completion_ids(completions[0])) == text
