"""Tables of encoded rows: the rows that the encoder makes, kept on disk, made again when and only when they would differ."""

import errno
import json
import os
import threading

import pytest

from rlhf import encoded
from rlhf.encoded import demonstrations, encoded_rows
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.jsonl import write_jsonl
from rlhf.prompts import Prompt, load_prompts
from tests.helpers import tiny_encoder

ENCODER = tiny_encoder()
ROWS = [{"prompt": [{"role": "user", "content": f"What is {'hot ' * n}?"}], "completion": "cold " * n, "id": f"{n:016x}"} for n in range(1, 8)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "data" / "demonstrations" / "train.jsonl"
    write_jsonl(file, ROWS)
    return file


@pytest.fixture
def written(monkeypatch):
    """The kinds of the tables that were written, in order."""
    kinds, plain = [], encoded._write

    def write(path, rows, kind, encode):
        kinds.append(kind)
        return plain(path, rows, kind, encode)

    monkeypatch.setattr(encoded, "_write", write)
    return kinds


def test_rows_are_the_encoders_and_long_ones_are_left_out(path):
    rows = demonstrations(path, ENCODER, 1000, 1000)
    wanted = [(ENCODER.prompt_ids(row["prompt"]), ENCODER.completion_ids(row["completion"])) for row in ROWS]
    assert list(rows) == wanted and rows[2:4] == wanted[2:4] and rows[-1] == wanted[-1]
    assert rows.lengths.tolist() == [len(p) + len(c) for p, c in wanted]
    assert rows.items_in("completion") == sum(len(c) for _, c in wanted) and rows.read == len(rows) == 7
    limit = len(wanted[3][1])
    short = demonstrations(path, ENCODER, 1000, limit)
    assert list(short) == [pair for pair in wanted if len(pair[1]) <= limit] and short.read == 7 and 0 < len(short) < 7
    assert len(demonstrations(path, ENCODER, 1, 1000)) == 0


def test_some_rows_are_of_all_parts_of_a_file(tmp_path):
    """The first of them may all come from one source."""
    file = tmp_path / "data" / "prompts" / "test.jsonl"
    write_jsonl(file, [{"prompt": [{"role": "user", "content": "Hi"}], "id": f"{'base' if n < 300 else 'mine'} {n}"} for n in range(600)])
    rows = load_prompts(str(tmp_path), "test", ENCODER, 100)
    picked = [row.id for row in rows.some(100)]
    assert len(set(picked)) == 100 and picked == sorted(picked, key=lambda name: int(name.split()[1]))
    assert 35 <= sum(name.startswith("base") for name in picked) <= 65  # 50 of 100 in the mean, 4.6 either way
    assert [row.id for row in rows.some(100)] == picked
    assert set(picked) < {row.id for row in rows.some(200)}
    assert rows.some(600) == rows.some(1000) == rows[:]


def test_batches_meet_without_a_seam(path, monkeypatch):
    whole = list(demonstrations(path, ENCODER, 1000, 1000))
    monkeypatch.setattr(encoded, "BATCH_ROWS", 2)
    monkeypatch.setattr(encoded, "VERSION", -1)
    assert list(demonstrations(path, ENCODER, 1000, 1000)) == whole


def test_a_table_is_made_once_for_the_same_content_encoder_and_limits(path, written):
    for _ in range(2):
        demonstrations(path, ENCODER, 100, 100)
    path.touch()
    demonstrations(path, tiny_encoder(), 100, 100)
    assert written == ["demonstrations"]
    demonstrations(path, ENCODER, 100, 99)  # another limit
    other = tiny_encoder()
    other.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    demonstrations(path, Encoder(other.tokenizer), 100, 100)  # another template
    write_jsonl(path, [*ROWS, ROWS[0]])
    assert len(demonstrations(path, ENCODER, 100, 100)) == 8  # another content
    assert len(written) == 4
    write_jsonl(path, ROWS)
    demonstrations(path, ENCODER, 100, 100)  # the first content again
    assert len(written) == 4


def test_a_folder_named_by_the_environment_is_shared_by_runs(path, tmp_path, written, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    again = tmp_path / "other" / "data" / "demonstrations" / "train.jsonl"
    write_jsonl(again, ROWS)
    assert list(demonstrations(path, ENCODER, 100, 100)) == list(demonstrations(again, ENCODER, 100, 100))
    assert len(written) == 1 and not (path.parent / "encoded").exists()


def test_a_table_that_was_not_finished_is_made_anew(path, monkeypatch):
    def stops(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded_rows(path, ENCODER, "text", (), stops)
    rows = encoded_rows(path, ENCODER, "text", (), lambda rows: [{"ids": [1], "length": 1} for _ in rows])
    assert len(rows) == 7


def test_several_at_once_make_one_table(path, written):
    """Locks of the file system keep processes apart and, each having opened the file itself, threads too."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(demonstrations(path, ENCODER, 100, 100)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and len(found) == 4 and all(rows == found[0] for rows in found)


def test_a_table_that_is_there_is_read_without_a_word_written(path):
    """A finished run on a read-only disk; root may write into folders of any mode, so the lock is looked for too."""
    made, folder = list(demonstrations(path, ENCODER, 100, 100)), path.parent / "encoded"
    (folder / ".lock").unlink()
    folder.chmod(0o555)
    try:
        assert list(demonstrations(path, ENCODER, 100, 100)) == made and not (folder / ".lock").exists()
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(("number", "error"), [(errno.EROFS, InputError), (errno.EACCES, InputError), (errno.ENOSPC, OSError)])
def test_a_table_that_may_not_be_made_is_refused_with_the_remedy_and_a_full_disk_is_not(path, monkeypatch, number, error):
    def refused(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(encoded, "open", refused, raising=False)
    with pytest.raises(error, match="RLHF_CACHE=FOLDER" if error is InputError else "No space left"):
        demonstrations(path, ENCODER, 100, 100)


def test_rows_that_are_not_wanted_do_not_count_as_read(path):
    def encode(rows):
        return [{"ids": [2], "length": 1} for _ in rows]

    rows = encoded_rows(path, ENCODER, "text", (), encode, wanted=lambda row: row["id"] > ROWS[4]["id"])
    assert (rows.read, len(rows)) == (2, 2)


def test_what_is_left_out_is_listed_by_reason_with_file_and_line(tmp_path):
    """Ten words are too long here; a row of the embedded world has no place."""
    long, short = "one two three four five six seven eight nine ten", "one"
    made = [(long, short, "mine/a.jsonl:3"), (short, short, "mine/a.jsonl:4"), (short, long, "mine/a.jsonl:7"), (long, long, "mine/a.jsonl:9"),
            (long, short, "b:c.csv:2"), (long, short, None), (long, short, "by hand")]
    rows = [{"prompt": [{"role": "user", "content": prompt}], "completion": completion, "id": str(n), **({"source": source} if source else {})}
            for n, (prompt, completion, source) in enumerate(made)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    limit = len(ENCODER.prompt_ids(rows[1]["prompt"])) + 2
    for _ in range(2):  # made, and read
        kept = demonstrations(tmp_path / "train.jsonl", ENCODER, limit, limit)
        assert (kept.read, len(kept), kept.left_out) == (7, 1, {})
        assert kept.dropped == {
            "prompt over data.max_prompt_tokens": {"rows": 5, "where": {"mine/a.jsonl": [3, 9], "b:c.csv": [2]}},
            "completion over data.max_completion_tokens": {"rows": 1, "where": {"mine/a.jsonl": [7]}}}
    encoded.write_drops(tmp_path, {"demonstrations/train.jsonl": kept})
    assert json.loads((tmp_path / "drops.json").read_text()) == [
        {"file": "demonstrations/train.jsonl", "read": 7, "made": 1, "dropped": kept.dropped, "left_out": {}}]


def test_prompts_keep_messages_id_and_family(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好，世界。"}]
    write_jsonl(tmp_path / "data/prompts/train.jsonl", [{"prompt": messages, "id": "0a"}, {"prompt": messages[1:], "id": "0b", "family": "sums"}])
    assert load_prompts(str(tmp_path), "train", ENCODER, 100)[:] == [
        Prompt(messages, ENCODER.prompt_ids(messages), "0a", None), Prompt(messages[1:], ENCODER.prompt_ids(messages[1:]), "0b", "sums")]


def test_a_file_that_is_not_there_or_was_cut_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        demonstrations(tmp_path / "train.jsonl", ENCODER, 9, 9)
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(ROWS[0]) + '\n{"prompt": [')
    with pytest.raises(InputError, match=r"train.jsonl:2: not JSON"):
        demonstrations(file, ENCODER, 9, 9)
