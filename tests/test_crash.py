"""Ends nobody foresaw: a crash report a person can act on, a disk that gives out, a folder that is removed while a stage runs."""

import errno
import json
import os
import pathlib
import shutil

import pytest
import torch

from rlhf import runs
from rlhf.cli import guarded
from rlhf.config import load_config
from rlhf.errors import TrainingStopped
from rlhf.runs import open_now, open_stage


def stage_that(tmp_path, fails):
    """The exit code of a stage that logs two steps and then calls `fails(stage)`."""
    def action():
        stage = open_stage("prepare", load_config(None, [f"run.dir={tmp_path / 'run'}"]))
        stage.log(1, loss=2.0)
        stage.log(2, loss=float("nan"), grad_norm=float("inf"))
        fails(stage)
        stage.finish()

    return guarded(action)


def test_a_crash_leaves_a_report_and_says_what_where_and_how_to_go_on(tmp_path, capsys):
    assert stage_that(tmp_path, lambda stage: 1 / 0) == 1
    what, where, how = capsys.readouterr().err.splitlines()
    assert what == "error: prepare crashed: ZeroDivisionError: division by zero"
    report = tmp_path / "run" / "prepare" / "crash.txt"
    assert where.startswith("where: ") and str(report) in where and "the same command resumes" in how
    text = report.read_text()
    assert "1 / 0" in text and '"loss": 2.0' in text and "torch 2" in text and "kl_coef: 0.2" in text


def test_a_finished_stage_leaves_no_crash_report_behind(tmp_path):
    stage_that(tmp_path, lambda stage: 1 / 0)
    assert stage_that(tmp_path, lambda stage: None) == 0
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists() and open_now() is None


@pytest.mark.parametrize(("error", "says"), [
    (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), "no space is left on the disk (x.safetensors)"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/7"), "no space is left"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 160512 vs 160400"), "no space is left"),
    (RuntimeError("basic_ios::clear: iostream error"), "no space is left"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space is left")])
def test_a_disk_that_gives_out_ends_with_3_and_the_reason(tmp_path, capsys, error, says):
    def fails(stage):
        raise error

    assert stage_that(tmp_path, fails) == 3
    said = capsys.readouterr().err
    assert says in said and str(tmp_path / "run" / "prepare") in said and "the same command goes on" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="wants a disk that is always full")
def test_a_full_disk_is_told_from_what_torch_says_of_it(tmp_path, capsys):
    assert stage_that(tmp_path, lambda stage: torch.save(torch.zeros(100_000), "/dev/full")) == 3
    assert "no space is left" in capsys.readouterr().err


def test_a_disk_that_is_full_before_a_stage_writes_its_first_word_ends_with_3(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    assert stage_that(tmp_path, pytest.fail) == 3
    assert "prepare: " in (said := capsys.readouterr().err) and "no space is left" in said


def test_a_checkpoint_that_cannot_be_read_is_no_full_disk(tmp_path):
    """The same file of torch's complains, of a file that was cut."""
    def fails(stage):
        torch.save(torch.zeros(100), tmp_path / "x.pt")
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:500])
        torch.load(tmp_path / "x.pt")

    assert stage_that(tmp_path, fails) == 1


def test_a_crash_report_that_cannot_be_written_leaves_no_empty_file_and_is_said_instead(tmp_path, capsys, monkeypatch):
    def full(path, text, **how):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    assert stage_that(tmp_path, lambda stage: 1 / 0) == 1
    assert "could not be written" in (said := capsys.readouterr().err) and "1 / 0" in said
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists()


def test_a_folder_removed_while_a_stage_runs_ends_with_3(tmp_path, capsys):
    def fails(stage):
        shutil.rmtree(stage.folder)
        stage.log(3, loss=1.0)

    assert stage_that(tmp_path, fails) == 3
    assert "was removed while the stage ran" in capsys.readouterr().err
    assert not (tmp_path / "run" / "prepare").exists()


def test_what_is_no_number_is_null_in_the_metrics(tmp_path):
    stage_that(tmp_path, lambda stage: None)
    lines = (tmp_path / "run" / "prepare" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "grad_norm": None}]


def test_foreseen_ends_leave_no_crash_report(tmp_path):
    def fails(stage):
        raise TrainingStopped("prepare: enough")

    assert stage_that(tmp_path, fails) == 3
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists()


def test_memory_that_runs_out_ends_with_3_and_what_to_lower(tmp_path, capsys):
    def fails(stage):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert stage_that(tmp_path, fails) == 3
    said = capsys.readouterr().err
    assert "memory ran out: CUDA out of memory" in said and "lower data.max_prompt_tokens or data.max_completion_tokens" in said
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists()
