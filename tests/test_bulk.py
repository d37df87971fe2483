"""All kinds from one reading of a file: the rows, drops and errors of `convert` for each kind, however many processes share the work."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from itertools import chain

import pytest

from rlhf.data import KINDS, Report, bulk, convert, split_of
from rlhf.errors import InputError
from rlhf.jsonl import json_line
from rlhf.runs import lock_run
from tests.test_data_formats import PREFERENCE_SAMPLES, write

SHARES = dict.fromkeys(KINDS, (0.2, 0.2)) | {"text": (0.1, 0.0)}


def in_bulk(source, kinds=KINDS, mapping=None, processes=1):
    """Lines by kind and split, and the reports, of `convert_all`."""
    reports, found = {kind: Report(source, kind) for kind in kinds}, {}
    for kind, split, count, lines in bulk.convert_all(source, reports, mapping, SHARES, False, processes):
        assert count == lines.count(b"\n")
        found.setdefault((kind, split), []).extend(line + "\n" for line in lines.decode().split("\n")[:-1])
    return found, reports


def one_by_one(source, kinds=KINDS, mapping=None):
    """The same from `convert`, a reading for each kind."""
    reports, found = {}, {}
    for kind in kinds:
        converted = convert(source, kind, mapping)
        for row in converted.rows:
            found.setdefault((kind, split_of(row["id"], *SHARES[kind])), []).append(json_line(row))
        reports[kind] = converted.report
    return found, reports


def assert_alike(source, processes=1, **options):
    (lines, reports), (wanted_lines, wanted_reports) = in_bulk(source, processes=processes, **options), one_by_one(source, **options)
    assert lines == wanted_lines
    for kind, report in wanted_reports.items():
        assert json.dumps(reports[kind].as_json()) == json.dumps(report.as_json())  # as text: the order of the reasons counts too
        assert reports[kind].describe() == report.describe()


def awkward_lines(count):
    """Good rows, prompts asked before, and rows and lines that cannot be used, in turn."""
    for number in range(count):
        row = {"prompt": f"Question {number % 70}?", "chosen": f"good {number}", "rejected": f"bad {number}"}
        yield {3: '{"prompt": ', 5: json.dumps({**row, "chosen": ""}), 7: "[1]", 11: json.dumps({**row, "prompt": " "}), 13: " ",
               17: json.dumps({**row, "prompt": "好\u2028?"}, ensure_ascii=False)}.get(number % 19, json.dumps(row)) + "\n"


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(bulk, "BATCH_ROWS", 10)
    monkeypatch.setattr(bulk, "BATCH_GROUPS", 3)
    monkeypatch.setattr(bulk, "ALONE", 2)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_what_one_reading_for_each_kind_gives(tmp_path, small_batches, processes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(awkward_lines(300)))
    assert_alike(str(path), processes)


def test_a_batch_also_ends_when_it_is_large(tmp_path, small_batches, monkeypatch):
    monkeypatch.setattr(bulk, "BATCH_BYTES", 100)
    sizes = [len(batch) for batch in bulk._batches(enumerate([b"x" * 60] * 5 + [None] + [b"x" * 300] * 2))]
    assert sizes == [2, 2, 3, 1]  # 120, 120, 60 + 0 + 300 and 300 bytes
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(awkward_lines(60)))
    assert_alike(str(path), 2)


@pytest.mark.parametrize("place", range(len(PREFERENCE_SAMPLES)))
def test_every_schema_gives_the_same_in_bulk(tmp_path, small_batches, place):
    assert_alike(write(tmp_path, [PREFERENCE_SAMPLES[place][1]] * 25), 2)


def test_trees_are_not_cut_by_the_end_of_a_batch(tmp_path, small_batches):
    rows = []
    for tree in range(7):
        place = {"message_tree_id": f"t{tree}", "deleted": False}
        rows.append({**place, "message_id": f"q{tree}", "parent_id": None, "role": "prompter", "text": f"Ask {tree}?"})
        answer = {**place, "parent_id": f"q{tree}", "role": "assistant"}
        rows += [{**answer, "message_id": f"a{tree}{n}", "text": f"Answer {n}", "rank": n} for n in range(3)]
    assert_alike(write(tmp_path, rows), 2, kinds=("preferences", "demonstrations", "prompts"))


def test_a_mapping_holds_in_every_process(tmp_path, small_batches):
    path = write(tmp_path, [{"ask": {"q": f"Question {n}?"}, "good": "a", "bad": f"b{n}"} for n in range(60)])
    assert_alike(path, 2, mapping={"prompt": "ask.q", "chosen": "good", "rejected": "bad"})


def test_text_files_are_read_for_each_kind_as_it_wants_them(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("One line.\n\nAnother line.\n")
    assert_alike(str(path), kinds=("prompts", "text"))
    assert len(list(chain.from_iterable(in_bulk(str(path), ("prompts", "text"))[0].values()))) == 3  # two prompts, one document


def test_a_file_damaged_far_inside_is_refused_from_a_pool_too(tmp_path, small_batches):
    import gzip

    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(awkward_lines(20_000)).encode())[:-2000])
    with pytest.raises(InputError, match=r"damaged after line \d+"):
        in_bulk(str(path), processes=2)


def test_a_source_that_gives_nothing_is_refused(tmp_path):
    path = write(tmp_path, [{"prompt": "Hi?", "chosen": "same", "rejected": "same"}])
    with pytest.raises(InputError, match="line 1: none of the 1 rows"):
        in_bulk(path)


LARGE_PREPARE = """
import multiprocessing, sys
from rlhf.data import Report, bulk
from rlhf.runs import lock_run
from pathlib import Path

lock_run(Path(sys.argv[1]))
bulk.BATCH_ROWS, bulk.ALONE = 10, 2
made = bulk.convert_all(sys.argv[2], {"preferences": Report(sys.argv[2], "preferences")}, None, {"preferences": (0.2, 0.2)}, False, 2)
next(pieces for pieces in made if multiprocessing.active_children())  # the pool has given its first
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no pool is forked")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_prepare_is_killed_its_pool_ends_too_and_the_run_is_free(tmp_path, how):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(awkward_lines(2000)))
    main = subprocess.Popen([sys.executable, "-c", LARGE_PREPARE, tmp_path / "run", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pool = [int(pid) for pid in main.stdout.readline().split()]
    try:
        assert len(pool) == 2
        main.send_signal(how)
        assert main.wait() == -how
        try:
            main.communicate(timeout=15)  # standard output ends with the last process that holds it
        except subprocess.TimeoutExpired:
            pytest.fail("the pool outlives the process that forked it")
        lock_run(tmp_path / "run")
    finally:
        main.kill()
        for pid in pool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        main.communicate()
