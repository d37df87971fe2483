"""The run folder: what a stage leaves, what it refuses, and that nothing is ever half written (DESIGN, "The run folder")."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from rlhf import runs
from rlhf.config import config_from_tree, load_config, replace_section
from rlhf.errors import InputError
from rlhf.jsonl import json_line, read_jsonl, replacing, replacing_folder, write_json, write_jsonl
from rlhf.runs import READS, file_digest, open_stage, source_commit, versions


@pytest.fixture
def config(tmp_path):
    return load_config("configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"])


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refusal(*arguments, **how):
    with pytest.raises(InputError) as caught:
        open_stage(*arguments, **how)
    return str(caught.value)


# What a stage leaves

def test_a_stage_writes_its_settings_and_manifest_first_and_done_last(config):
    stage = open_stage("prepare", config, inputs={"a.jsonl": "abc"})
    assert not stage.done and set(files_of(stage.folder)) == {"config.yaml", "manifest.json"}
    assert config_from_tree(yaml.safe_load((stage.folder / "config.yaml").read_text()), "it") == config
    manifest = json.loads((stage.folder / "manifest.json").read_text())
    assert manifest["seed"] == config.seed and manifest["inputs"] == {"a.jsonl": "abc"} and manifest["parents"] == {}
    assert manifest["versions"]["torch"] and manifest["commit"] and manifest["command"]
    stage.finish(rows=3)
    assert stage.done and json.loads((stage.folder / "DONE").read_text())["rows"] == 3


def test_done_holds_the_digest_of_the_model_and_checkpoints_go(config):
    stage = open_stage("pretrain", config)
    stage.model.mkdir()
    (stage.model / "model.safetensors").write_bytes(b"weights")
    (stage.checkpoints / "step_0000001").mkdir(parents=True)
    stage.finish()
    assert json.loads((stage.folder / "DONE").read_text())["model_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert not stage.checkpoints.exists()


def test_metrics_are_lines_whose_names_stand_in_the_glossary(config):
    stage = open_stage("ppo", config)
    stage.log(1, loss=1 / 3, skipped_steps=2)
    stage.log(2, loss=0.25)
    with pytest.raises(KeyError):
        stage.log(3, los=1.0)
    rows = list(read_jsonl(stage.folder / "metrics.jsonl"))
    assert rows == [{"step": 1, "loss": pytest.approx(1 / 3, abs=1e-6), "skipped_steps": 2}, {"step": 2, "loss": 0.25}]


def test_a_resumed_stage_forgets_what_it_will_log_again_and_a_line_that_was_cut(config):
    stage = open_stage("ppo", config)
    for step in (1, 2, 3):
        stage.log(step, loss=float(step))
    with open(stage.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    again = open_stage("ppo", config)
    again.forget_after(2)
    again.log(3, loss=9.0)
    assert [(r["step"], r["loss"]) for r in read_jsonl(stage.folder / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_only_the_main_process_writes(config, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stage = open_stage("prepare", config)
    stage.log(1, loss=1.0)
    stage.forget_after(0)
    stage.finish()
    assert not stage.main and not (stage.folder.parent).exists()


# What it refuses

def test_a_stage_before_its_parent_names_it_and_the_command_and_writes_nothing(config, tmp_path):
    message = refusal("sft", config, parents=("prepare", "pretrain"))
    assert "sft needs the finished stage prepare" in message and "python -m stages.prepare" in message
    assert not (tmp_path / "run").exists()
    open_stage("prepare", config).finish()
    open_stage("pretrain", config, parents=("prepare",))  # begun, but not finished
    assert "pretrain" in refusal("sft", config, parents=("prepare", "pretrain"))
    assert not (tmp_path / "run" / "sft").exists()


def test_the_same_experiment_is_opened_again_and_a_finished_one_is_left_as_it_is(config):
    open_stage("prepare", config)
    open_stage("prepare", config).finish()
    before = files_of(open_stage("prepare", config).folder)
    stage = open_stage("prepare", config)
    assert stage.done and files_of(stage.folder) == before


def test_a_closing_line_is_forgotten_too(config):
    stage = open_stage("sft", config)
    stage.log(1, loss=1.0)
    stage.log(1, eval_loss=2.0, peak_memory_mb=7)
    stage.forget_after(1, closing="peak_memory_mb")
    assert list(read_jsonl(stage.folder / "metrics.jsonl")) == [{"step": 1, "loss": 1.0}]


def test_checkpoints_go_after_done_and_those_a_kill_left_beside_it_go_later(config, monkeypatch):
    """The other way round a kill between the two would leave half a checkpoint to go on from."""
    stage = open_stage("pretrain", config)
    stage.checkpoints.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        stage.finish()
    assert stage.done and stage.checkpoints.is_dir()
    assert open_stage("pretrain", config).done and not stage.checkpoints.exists()


def test_another_number_of_processes_is_refused_once_there_is_work_to_go_on_with(config, monkeypatch):
    stage = open_stage("pretrain", config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not open_stage("pretrain", config).done  # nothing was made yet
    monkeypatch.setenv("WORLD_SIZE", "1")
    stage = open_stage("pretrain", config)
    (stage.checkpoints / "step_0000001").mkdir(parents=True)
    before = files_of(stage.folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal("pretrain", config)
    assert "begun by 1 process and cannot be gone on with by 2" in message and str(stage.checkpoints) in message
    assert files_of(stage.folder) == before
    monkeypatch.setenv("WORLD_SIZE", "1")
    stage.finish()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert open_stage("pretrain", config).done  # a finished stage is read by any number


def test_which_evaluations_there_are_decides_only_when_the_best_is_handed_over(config):
    open_stage("ppo", config).log(1, loss=1.0)
    assert not open_stage("ppo", replace_section(config, "ppo", eval_every=1)).done
    assert "hand_over was 'last' and is now 'best'" in refusal("ppo", replace_section(config, "ppo", hand_over="best"))
    best = replace_section(replace_section(config, "run", dir=config.run.dir + "_best"), "ppo", hand_over="best")
    open_stage("ppo", best).log(1, loss=1.0)
    assert "eval_every was 2 and is now 1" in refusal("ppo", replace_section(best, "ppo", eval_every=1))


@pytest.mark.parametrize(("stage", "section", "change"), [
    ("pretrain", "pretrain", {"batch_tokens": 512}), ("sft", "sft", {"batch_size": 16}), ("reward", "reward", {"microbatch": 10}),
    ("ppo", "ppo", {"batch_size": 64}), ("collect", "collect", {"batch_size": 64}),
    ("pretrain", "pretrain", {"lr": 0.5}), ("ppo", "ppo", {"clip": 0.3}), ("collect", "world", {"agreement": 0.8}),
    ("sft", "run", {"precision": "fp32"})])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_other_settings_is_refused_with_what_changed_and_left_alone(config, stage, section, change, finished):
    opened = open_stage(stage, config)
    opened.log(1, loss=1.0)
    if finished:
        opened.finish()
    before = files_of(opened.folder)
    message = refusal(stage, replace_section(config, section, **change))
    (key, value), = change.items()
    was = getattr(getattr(config, section), key)
    assert f"{section}.{key} was {was!r} and is now {value!r}" in message and str(opened.folder) in message and "run.dir" in message
    assert files_of(opened.folder) == before


def test_a_start_that_came_to_nothing_does_not_bind_the_folder(config):
    """A mistyped data file, corrected: nothing was made under the first settings, so there is nothing to protect."""
    open_stage("prepare", config)
    stage = open_stage("prepare", replace_section(config, "data", text=["right.jsonl"]))
    assert yaml.safe_load((stage.folder / "config.yaml").read_text())["data"]["text"] == ["right.jsonl"]


def test_another_seed_is_another_experiment(config):
    open_stage("prepare", config).finish()
    tree = {"seed": config.seed + 1, "run": {"dir": config.run.dir}}
    assert f"seed was {config.seed} and is now {config.seed + 1}" in refusal("prepare", config_from_tree(tree, "it"))


@pytest.mark.parametrize("name", ["config.yaml.partial", "manifest.json.partial"])
def test_a_start_that_was_killed_or_is_being_written_by_the_main_process_is_no_work_either(config, name):
    stage = open_stage("prepare", config)
    (stage.folder / name).write_text("half")
    changed = replace_section(config, "world", documents=7)
    assert not open_stage("prepare", changed).done
    (stage.folder / "checkpoints").mkdir()
    assert "world.documents was 7" in refusal("prepare", config)


def test_a_setting_that_is_newer_than_the_run_counts_as_its_default(config):
    stage = open_stage("reward", config)
    stage.finish()
    saved, manifest = (stage.folder / name for name in ("config.yaml", "manifest.json"))
    tree = yaml.safe_load(saved.read_text())
    del tree["reward"]["flip_rate"]
    saved.write_text(yaml.safe_dump(tree))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "fingerprint": "made before that setting"}))
    assert open_stage("reward", config).done
    assert "reward.flip_rate was 0.0 and is now 0.25" in refusal("reward", replace_section(config, "reward", flip_rate=0.25))


def test_whether_ties_are_kept_decides_what_prepare_makes_of_given_preferences(config):
    """It leaves tied rows out for reward.ties=drop: finished so, they would be missing unnoticed under half."""
    open_stage("prepare", config).finish()
    assert open_stage("prepare", replace_section(config, "reward", ties="half")).done, "the embedded world's raters rank after it"
    given = replace_section(config, "data", preferences=["mine.jsonl"])
    given = replace_section(given, "run", dir=config.run.dir + "_given")
    open_stage("prepare", given).finish()
    assert "reward.ties was 'drop' and is now 'half'" in refusal("prepare", replace_section(given, "reward", ties="half"))
    assert open_stage("prepare", replace_section(given, "reward", lr=0.5)).done


def test_what_ppo_is_paid_by_decides_for_it_and_for_compare(config):
    """An ensemble must not become its first member unnoticed."""
    for stage in ("ppo", "compare"):
        opened = open_stage(stage, replace_section(config, "reward", members=3))
        opened.log(1, loss=1.0)
        assert "reward.members was 3 and is now 1" in refusal(stage, config), stage
    opened = open_stage("judge", config)  # any stage that does not read it
    opened.log(1, loss=1.0)
    assert "ppo.ensemble was 'mean' and is now 'worst'" in refusal("compare", replace_section(config, "ppo", ensemble="worst"))


def test_settings_that_a_stage_does_not_read_do_not_matter_to_it(config):
    open_stage("pretrain", config).finish()
    changed = replace_section(replace_section(config, "ppo", lr=0.5), "run", save_every=7, threads=1)
    assert open_stage("pretrain", changed).done


def test_a_parent_made_anew_and_an_input_that_changed_are_noticed(config):
    parent = open_stage("prepare", config)
    parent.finish(rows=1)
    open_stage("sft", config, parents=("prepare",), inputs={"x": "1"}).finish()
    assert "the input x has changed" in refusal("sft", config, parents=("prepare",), inputs={"x": "2"})
    parent.finish(rows=2)
    assert "the finished stage prepare has changed" in refusal("sft", config, parents=("prepare",), inputs={"x": "1"})


def test_a_folder_whose_settings_were_deleted_is_refused_too(config):
    stage = open_stage("ppo", config)
    (stage.folder / "config.yaml").unlink()
    stage.log(1, loss=1.0)
    assert "another experiment" in refusal("ppo", replace_section(config, "ppo", lr=0.5))


def test_every_stage_says_which_sections_it_reads():
    names = set(config_from_tree({}, "").__dataclass_fields__)
    for entries in READS.values():
        assert {entry.partition(".")[0] for entry in entries} <= names


# The lock

HOLD = """
import sys
from pathlib import Path
from rlhf.runs import lock_run

lock_run(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_works_on_is_refused_by_its_pid_and_free_after_a_kill(config):
    run = config.run.dir
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert other.stdout.readline() == "held\n"
        message = refusal("prepare", config)
        assert f"process {other.pid} works on this run" in message and "run.dir" in message
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    open_stage("prepare", config)  # kill -9 leaves no stale lock


FORKED = """
import os, sys, time
from pathlib import Path
from rlhf.runs import lock_run

lock_run(Path(sys.argv[1]))
child = os.fork()
if child:
    sys.stdin.read()
else:
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_forked_process_neither_frees_the_lock_nor_keeps_it_when_its_parent_is_killed(config):
    """The workers of a pool may live for a moment after kill -9 of the process that forked them."""
    run = config.run.dir
    parent = subprocess.Popen([sys.executable, "-c", FORKED, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    child = int(parent.stdout.readline())
    try:
        assert f"process {parent.pid} works on this run" in refusal("prepare", config)
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # raises where it is gone
        open_stage("prepare", config)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.communicate()


def test_a_process_may_open_its_own_run_again(config):
    open_stage("prepare", config)
    open_stage("pretrain", config)


@pytest.mark.parametrize("where", ["file", "below a file"])
def test_a_run_dir_that_cannot_be_written_is_refused_by_name(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / ("x" if where == "below a file" else "")
    message = refusal("prepare", load_config("configs/tiny.yaml", [f"run.dir={place}"]))
    assert str(tmp_path / "file") in message and "run.dir" in message
    assert (tmp_path / "file").read_text() == "mine"


# Files

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    assert write_jsonl(path, [{"a": 1}, {"b": "é\n"}]) == 2
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("half")
        raise RuntimeError
    assert list(read_jsonl(path)) == [{"a": 1}, {"b": "é\n"}]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "model"
    for text in ("one", "two"):
        with replacing_folder(place) as folder:
            (folder / "x").write_text(text)
            if text == "two":
                assert (place / "x").read_text() == "one"
    with pytest.raises(RuntimeError), replacing_folder(place) as folder:
        (folder / "x").write_text("three")
        raise RuntimeError
    assert (place / "x").read_text() == "two"
    with replacing_folder(place):
        pass
    assert list(place.iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_file_that_was_cut_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a":')
    with pytest.raises(InputError, match=r"x\.jsonl:2"):
        list(read_jsonl(path))
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path / "missing.jsonl"))


def test_json_keeps_text_as_it_is(tmp_path):
    texts = ["plain", "漢", "\x7f", "\x00\n", "\\u0041", "\U0001f642", '"']
    assert [json_line({"a": text}) for text in texts] == [json.dumps({"a": text}, ensure_ascii=False) + "\n" for text in texts]
    write_json(tmp_path / "x.json", {"name": "漢"})
    assert "漢" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_digest_versions_and_commit(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"abc" * 700_000)
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"abc" * 700_000).hexdigest()
    assert versions()["python"].count(".") == 2
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "rlhf")
    assert source_commit() == "unknown"
