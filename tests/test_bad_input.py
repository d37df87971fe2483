"""What a person can get wrong, through the command line: exit code, one message with thing and remedy, no traceback, nothing overwritten."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from rlhf.cli import STAGES, TOOLS, guarded, main, run_stage
from rlhf.errors import InputError, TrainingStopped
from rlhf.models import save_model
from rlhf.paths import PACKAGE
from tests.helpers import nano, tiny_encoder

SMALL = ["--config", "configs/tiny.yaml", "world.documents=40", "world.demonstrations=40", "world.prompts=40", "world.test_prompts=10"]


@pytest.fixture
def ends(capsys):
    """Runs `rlhf WORDS...` in this process; checks the exit code and that the error is one message; returns it."""
    def run(code, *words):
        try:
            found = main(list(words))
        except SystemExit as stop:  # argparse
            found = stop.code
        captured = capsys.readouterr()
        assert found == code, captured
        assert "Traceback" not in captured.err + captured.out
        if code == 2 and "usage:" not in captured.err:
            assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
        return captured.err if code else captured.out
    return run


def tree(folder):
    """Every file below a folder, with content and time."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def demonstration(i):
    return {"prompt": f"Question number {i}?", "completion": f"Answer {i}."}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# The command line itself

def test_help_of_every_stage_says_what_it_reads_and_every_setting(ends, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for stage in STAGES:
        said = ends(0, stage, "--help")
        assert f"python -m stages.{stage}" in said and "ppo.kl_coef=" in said and "configs/quickstart.yaml" in said
        assert max(map(len, said.splitlines())) <= 80
    for words in (["chat"], ["data"], ["data", "check"], ["bench"]):
        assert max(map(len, ends(0, *words, "--help").splitlines())) <= 80
    said = ends(0)
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ")] == [*STAGES, *TOOLS]
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("words", [["ppoo"], ["ppo", "--no-such-flag"], ["ppo", "--config"]])
def test_an_unknown_command_or_flag_ends_with_2(ends, words):
    said = ends(2, *words)
    assert words[-1] in said or "--config" in said


def test_settings_may_stand_on_both_sides_of_the_flags(tmp_path):
    seen = []
    code = run_stage(seen.append, "doc", ["ppo.lr=0.5", "--config", "configs/tiny.yaml", f"run.dir={tmp_path}", "--quiet", "--resume", "seed=9"])
    os.environ.pop("RLHF_QUIET")
    assert code == 0 and (seen[0].ppo.lr, seen[0].run.dir, seen[0].seed) == (0.5, str(tmp_path), 9)


# Wrong settings and files

@pytest.mark.parametrize(("words", "says"), [
    (["ppo.kl_coeff=1"], ["ppo.kl_coeff", "Did you mean ppo.kl_coef?"]),
    (["ppo.lr=fast"], ["ppo.lr", "'fast'", "float"]),
    (["--config", "no/such.yaml"], ["no/such.yaml", "configs/quickstart.yaml"]),
])
def test_wrong_settings_are_named(ends, tmp_path, words, says):
    said = ends(2, "prepare", f"run.dir={tmp_path / 'run'}", *words)
    assert all(word in said for word in says)
    assert not (tmp_path / "run").exists()


def prepare(ends, tmp_path, code, *words):
    return ends(code, "prepare", "--config", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}", *words)


def test_a_data_file_that_is_not_there_is_named(ends, tmp_path):
    said = prepare(ends, tmp_path, 2, f"data.demonstrations={tmp_path / 'missing.jsonl'}")
    assert str(tmp_path / "missing.jsonl") in said
    assert not list((tmp_path / "run").rglob("*.jsonl")) and not (tmp_path / "run" / "prepare" / "DONE").exists()
    right = write_lines(tmp_path / "right.jsonl", map(demonstration, range(60)))
    prepare(ends, tmp_path, 0, f"data.demonstrations={right}")  # the corrected command is not held to be another experiment


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_data_file_is_named(ends, tmp_path, content):
    file = tmp_path / ("empty.json" if content == "[]" else "empty.jsonl")
    file.write_text(content)
    said = prepare(ends, tmp_path, 2, f"data.demonstrations={file}")
    assert str(file) in said
    assert not (tmp_path / "run" / "prepare" / "DONE").exists()


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b"\xff\xfe\x00\x01"),
                                  lambda p: p.write_text('{"colour": "red", "size": 3}\n' * 5)])
def test_a_data_file_that_cannot_be_understood_is_named(ends, tmp_path, make):
    file = tmp_path / "mine.jsonl"
    make(file)
    assert str(file) in prepare(ends, tmp_path, 2, f"data.demonstrations={file}")


def test_a_gzip_file_that_was_cut_is_named(ends, tmp_path):
    file = tmp_path / "mine.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps(demonstration(i)).encode() + b"\n" for i in range(300)))
    file.write_bytes(whole[: len(whole) // 2])
    assert str(file) in prepare(ends, tmp_path, 2, f"data.demonstrations={file}")


def test_a_last_line_that_was_cut_is_dropped_aloud(ends, tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", map(demonstration, range(60)))
    file.write_text(file.read_text() + '{"prompt": ')
    assert "malformed JSON" in prepare(ends, tmp_path, 0, f"data.demonstrations={file}")
    reasons = json.loads((tmp_path / "run" / "data" / "drops.json").read_text())[0]["dropped"]
    assert reasons == {"malformed JSON": {"rows": 1, "where": {str(file): [61]}}}


def test_data_that_leaves_nothing_to_train_on_is_refused(ends, tmp_path):
    file = write_lines(tmp_path / "one.jsonl", [{"prompt": "", "completion": ""}])
    said = prepare(ends, tmp_path, 2, f"data.demonstrations={file}")
    assert str(file) in said and not (tmp_path / "run" / "prepare" / "DONE").exists()


def test_prompts_alone_are_refused_with_what_is_missing(ends, tmp_path):
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(30)])
    assert "data.demonstrations" in prepare(ends, tmp_path, 2, f"data.prompts={file}")


# The order of stages, and folders of other experiments

@pytest.mark.parametrize(("stage", "parent"), [("pretrain", "prepare"), ("sft", "prepare"), ("collect", "prepare"), ("reward", "prepare"),
                                               ("ppo", "prepare")])
def test_a_stage_before_its_parents_names_the_first_one_missing(ends, tmp_path, stage, parent):
    said = ends(2, stage, *SMALL, f"run.dir={tmp_path / 'run'}")
    assert f"{stage} needs the finished stage {parent}" in said and f"python -m stages.{parent}" in said
    assert not (tmp_path / "run").exists()


def test_compare_without_its_policies_names_the_stage_that_makes_one(ends, tmp_path):
    here = f"run.dir={tmp_path / 'run'}"
    for name, stage in (("ppo", "ppo"), ("ppo_last", "ppo"), ("round_1/ppo", "pipeline")):
        said = ends(2, "compare", *SMALL, here, f"compare.policies=[sft,{name}]")
        assert f"compare.policies names {name}, and" in said and f"run `python -m stages.{stage}`" in said
    assert not (tmp_path / "run").exists()


def test_rounds_before_the_last_are_known_to_be_the_pipelines(ends, tmp_path):
    here = [*SMALL, f"run.dir={tmp_path / 'run'}", "pipeline.rounds=2"]
    ends(0, "prepare", *here)
    said = ends(2, "collect", *here)
    assert "needs the finished stage round_1/ppo" in said and "Run `python -m stages.pipeline` for all" in said


def test_a_backbone_that_is_not_there_is_named(ends, tmp_path):
    words = [*SMALL, f"run.dir={tmp_path / 'run'}", f"model.init={tmp_path / 'nothing'}"]
    ends(0, "prepare", *words)
    ends(0, "pretrain", *words)  # skipped
    assert str(tmp_path / "nothing") in ends(2, "sft", *words)


def test_a_score_function_that_is_not_there_is_named(ends, tmp_path):
    words = [*SMALL, f"run.dir={tmp_path / 'run'}", "ppo.score=no_such_module:f"]
    ends(0, "prepare", *words)
    run = tmp_path / "run"
    (run / "sft").mkdir()
    (run / "sft" / "DONE").write_text("{}")
    save_model(nano(tiny_encoder()), tiny_encoder(), run / "sft" / "model")
    assert "no_such_module" in ends(2, "ppo", *words)


def test_a_folder_of_another_experiment_is_refused_and_stays_as_it_was(ends, tmp_path):
    words = [*SMALL, f"run.dir={tmp_path / 'run'}"]
    ends(0, "prepare", *words)
    before = tree(tmp_path / "run")
    said = ends(2, "prepare", *words, "world.flaw_rate=0.9")
    assert "world.flaw_rate was 0.5 and is now 0.9" in said and "run.dir" in said
    assert "seed was 1 and is now 2" in ends(2, "prepare", *words, "seed=2")
    assert "already done" in ends(0, "prepare", *words)
    assert tree(tmp_path / "run") == before


def test_an_input_file_that_changed_after_prepare_is_noticed(ends, tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", map(demonstration, range(60)))
    prepare(ends, tmp_path, 0, f"data.demonstrations={file}")
    write_lines(file, map(demonstration, range(61)))
    before = tree(tmp_path / "run")
    assert f"the input {file} has changed" in prepare(ends, tmp_path, 2, f"data.demonstrations={file}")
    assert tree(tmp_path / "run") == before


def test_a_saved_data_set_that_changed_after_prepare_is_noticed(ends, tmp_path, capsys):
    import datasets

    folder = tmp_path / "saved"
    for answer in ("one", "two"):
        shutil.rmtree(folder, ignore_errors=True)
        datasets.Dataset.from_list([{"prompt": f"Question number {i}?", "completion": answer} for i in range(30)]).save_to_disk(folder)
        capsys.readouterr()  # its progress bar
        said = prepare(ends, tmp_path, 0 if answer == "one" else 2, f"data.demonstrations={folder}")
        (folder / "cache-0123.arrow").write_bytes(b"left by datasets")
        if answer == "one":
            assert "already done" in prepare(ends, tmp_path, 0, f"data.demonstrations={folder}")
    assert f"the input {folder}/data-00000-of-00001.arrow has changed" in said


def test_a_folder_of_files_is_watched_too(ends, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_lines(folder / "a.jsonl", map(demonstration, range(60)))
    write_lines(folder / "b.jsonl", map(demonstration, range(60, 70)))
    prepare(ends, tmp_path, 0, f"data.demonstrations={folder}")
    assert "already done" in prepare(ends, tmp_path, 0, f"data.demonstrations={folder}")
    (folder / "b.jsonl").rename(tmp_path / "b.jsonl")
    assert f"the input {folder / 'b.jsonl'} is gone" in prepare(ends, tmp_path, 2, f"data.demonstrations={folder}")
    write_lines(folder / "b.jsonl", map(demonstration, range(60, 71)))
    assert f"the input {folder / 'b.jsonl'} has changed" in prepare(ends, tmp_path, 2, f"data.demonstrations={folder}")


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_run_without_prompts_to_ask_at_the_end_does_not_begin(ends, tmp_path, split):
    file = write_lines(tmp_path / "mine.jsonl", map(demonstration, range(60)))
    words = ["--config", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}", f"data.demonstrations={file}", f"data.{split}_fraction=0"]
    said = ends(2, "pipeline", *words)
    assert f"there are no {split} prompts" in said and f"a larger data.{split}_fraction" in said
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_numpy_refuses_is_refused_at_once(ends, tmp_path, seed):
    assert "seed: found" in ends(2, "prepare", *SMALL, f"run.dir={tmp_path / 'run'}", f"seed={seed}")


def test_a_folder_that_holds_a_crash_report_alone_takes_other_settings(ends, tmp_path):
    words = [*SMALL, f"run.dir={tmp_path / 'run'}"]
    (tmp_path / "run" / "prepare").mkdir(parents=True)
    for name, text in (("crash.txt", "x"), ("manifest.json", '{"fingerprint": "other", "processes": 1}'), ("config.yaml", "seed: 7")):
        (tmp_path / "run" / "prepare" / name).write_text(text)
    ends(0, "prepare", *words)
    assert not (tmp_path / "run" / "prepare" / "crash.txt").exists()


def test_flash_attention_without_a_gpu_is_refused(ends, tmp_path):
    words = [*SMALL, f"run.dir={tmp_path / 'run'}", "model.attention=flash_attention_2"]
    ends(0, "prepare", *words)
    assert "model.attention=flash_attention_2: found cpu" in ends(2, "pretrain", *words)


@pytest.mark.parametrize(("setting", "says"), [
    ("compare.policies=[sft,pppo]", "found 'pppo', wanted some of pretrained (made by pretrain"), ("compare.policies=[sft,reward]", "found 'reward'"),
    ("compare.policies=[sft,sft_at_1000]", "found temperature 1000"), ("compare.judge=no_such_module:f", "no_such_module"),
    ("compare.judge=goldd", "compare.judge: found 'goldd', wanted auto, gold, judge, proxy"),
    ("compare.judge=RUN/reward", "/reward', wanted auto, gold, judge, proxy"),
    ("compare.judge=judge", "data.judge_fraction=0"), ("ppo.score=no_such_module:f", "no_such_module"),
    ("ppo.mix={no_such_module:f: 0.5}", "no_such_module")])
def test_what_the_last_stages_would_refuse_is_refused_before_the_first(ends, tmp_path, setting, says):
    for command in ("pipeline", "compare") if setting.startswith("compare") else ("pipeline",):
        assert says in ends(2, command, *SMALL, f"run.dir={tmp_path / 'run'}", setting.replace("RUN", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# Places that cannot be written, and runs that are busy

def test_a_run_dir_that_is_a_file_is_named(ends, tmp_path):
    (tmp_path / "run").write_text("my notes")
    assert str(tmp_path / "run") in prepare(ends, tmp_path, 2)
    assert (tmp_path / "run").read_text() == "my notes"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_run_dir_without_permission_is_named(ends, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert str(tmp_path / "run") in prepare(ends, tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)


WAIT = """
import sys, time
from pathlib import Path
from rlhf.cli import run_stage
from rlhf.runs import open_stage

def main(config):
    open_stage("prepare", config)
    print("working", flush=True)
    time.sleep(60)

sys.exit(run_stage(main, "doc"))
"""


@pytest.fixture
def busy(tmp_path):
    """A process that works on the run until it is stopped."""
    process = subprocess.Popen([sys.executable, "-c", WAIT, "--config", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}"], cwd=PACKAGE.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    assert process.stdout.readline() == "working\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_works_on_is_refused_by_its_pid(ends, tmp_path, busy):
    assert f"process {busy.pid} works on this run" in prepare(ends, tmp_path, 2)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(busy):
    busy.send_signal(signal.SIGINT)
    _, said = busy.communicate(timeout=20)
    assert busy.returncode == 130
    assert "the same command goes on" in said and "Traceback" not in said


# How each way of ending is told

def raising(error):
    def action(*_):
        raise error
    return action


@pytest.mark.parametrize(("action", "code", "says"), [
    (lambda: None, 0, ""), (raising(InputError("x.jsonl:3: found a, wanted b")), 2, "error: x.jsonl:3: found a, wanted b\n"),
    (raising(TrainingStopped("ppo: no gradient")), 3, "error: ppo: no gradient\n"),
    (raising(KeyboardInterrupt()), 130, "\ninterrupted: the same command goes on from the last checkpoint\n")])
def test_exit_codes_and_messages(capsys, action, code, says):
    assert guarded(action) == code and capsys.readouterr().err == says


@pytest.mark.parametrize("name", ["chat", "sft"])
def test_ctrl_c_while_the_libraries_load_ends_without_their_traceback(monkeypatch, capsys, name):
    monkeypatch.setattr("importlib.import_module", raising(KeyboardInterrupt()))
    assert main([name]) == 130 and capsys.readouterr().err == "\ninterrupted before anything was done\n"


def test_a_stage_that_is_interrupted_while_torch_loads_ends_as_the_command_does(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    ended = subprocess.run([sys.executable, "-m", "stages.sft"], cwd=PACKAGE.parent, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\ninterrupted before anything was done\n")


def test_other_errors_while_a_stage_loads_keep_their_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')\n")
    ended = subprocess.run([sys.executable, "-m", "stages.sft"], cwd=PACKAGE.parent, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"})
    assert ended.returncode == 1 and ended.stderr.startswith("Traceback") and ended.stderr.endswith("ImportError: broken\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


def test_another_file_in_a_finished_run_is_said_once(ends, tmp_path):
    """Neither file has changed, and neither is gone: the setting names another one."""
    one, other = (write_lines(tmp_path / f"{name}.jsonl", map(demonstration, range(60))) for name in ("one", "other"))
    prepare(ends, tmp_path, 0, f"data.demonstrations={one}")
    said = prepare(ends, tmp_path, 2, f"data.demonstrations={other}")
    assert f"data.demonstrations was ['{one}'] and is now ['{other}']" in said and "the input" not in said
    said = prepare(ends, tmp_path, 2, f"data.demonstrations=[{one},{other}]")
    assert f"is now ['{one}', '{other}']" in said and "the input" not in said
    write_lines(one, map(demonstration, range(61)))
    said = prepare(ends, tmp_path, 2, f"data.demonstrations=[{one},{other}]")
    assert f"the input {one} has changed since" in said and said.count("the input") == 1


def test_a_file_that_came_into_a_folder_of_a_finished_run_is_said(ends, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_lines(folder / "a.jsonl", map(demonstration, range(60)))
    prepare(ends, tmp_path, 0, f"data.demonstrations={folder}")
    write_lines(folder / "b.jsonl", map(demonstration, range(60, 70)))
    assert f"the input {folder / 'b.jsonl'} is new" in prepare(ends, tmp_path, 2, f"data.demonstrations={folder}")
