"""What a setting names must not change behind its name: replaced weights and edited functions are refused, copies and what nobody reads are not."""

import json
import os
import random
import shutil

import pytest

from rlhf import contents
from rlhf.config import load_config
from rlhf.contents import model_digest
from rlhf.errors import InputError
from rlhf.runs import open_stage

CODE = "def f(prompts, completions):\n    return [{} for _ in completions]\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model folder `models/m` and a module `scores_of_mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "models/m").mkdir(parents=True)
    (tmp_path / "models/m/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "models/m/model.safetensors").write_bytes(b"weights")
    (tmp_path / "scores_of_mine.py").write_text(CODE.format(1.0))
    yield tmp_path
    __import__("sys").modules.pop("scores_of_mine", None)


def opened(stage, *overrides):
    """The stage of a run that has already made something."""
    stage = open_stage(stage, load_config("configs/tiny.yaml", ["run.dir=run", *overrides]))
    stage.log(1, loss=1.0)
    return stage


def replace_weights(place):
    (place / "models/m/model.safetensors").write_bytes(b"WEIGHTS")  # of the same size
    os.utime(place / "models/m/model.safetensors", (1, 1))


def edit_function(place):
    (place / "scores_of_mine.py").write_text(CODE.format(2.0))


MODEL, FUNCTION = "models/m", "scores_of_mine:f"


@pytest.mark.parametrize(("stage", "override", "names", "change"), [
    ("sft", f"model.init={MODEL}", f"model.init={MODEL}", replace_weights),
    ("reward", f"reward.init={MODEL}", f"reward.init={MODEL}", replace_weights),
    ("judge", f"reward.init={MODEL}", f"reward.init={MODEL}", replace_weights),
    ("ppo", f"ppo.score={FUNCTION}", f"ppo.score={FUNCTION}", edit_function),
    ("ppo", f"ppo.mix={{{FUNCTION}: 0.5}}", f"ppo.mix={FUNCTION}", edit_function),
    ("ppo", f"ppo.mix={{{MODEL}: 0.5}}", f"ppo.mix={MODEL}", replace_weights),
    ("compare", f"compare.judge={FUNCTION}", f"compare.judge={FUNCTION}", edit_function),
    ("compare", f"compare.judge={MODEL}", f"compare.judge={MODEL}", replace_weights),
    ("compare", f"model.init={MODEL}", f"model.init={MODEL}", replace_weights)])
def test_what_changed_behind_a_setting_is_refused_by_its_name_until_it_is_put_back(place, stage, override, names, change):
    opened(stage, override)
    kept = place.with_name(place.name + "_kept")
    shutil.copytree(place, kept, ignore=shutil.ignore_patterns("run"))
    change(place)
    with pytest.raises(InputError, match="holds another experiment") as caught:
        opened(stage, override)
    assert f"what {names} names has changed since" in str(caught.value) and "Put back what was there, name another" in str(caught.value)
    for name in ("models", "scores_of_mine.py"):  # a copy, with times of its own
        shutil.copytree(kept / name, place / name, dirs_exist_ok=True) if name == "models" else shutil.copy(kept / name, place / name)
    opened(stage, override).finish()
    change(place)
    if change is edit_function:
        assert opened(stage, override).done  # the file may have got another function since
    else:
        with pytest.raises(InputError, match="names has changed since"):
            opened(stage, override)


@pytest.mark.parametrize(("stage", "override"), [
    ("ppo", f"model.init={MODEL}"), ("collect", f"model.init={MODEL}"), ("ppo", f"compare.judge={MODEL}"), ("compare", f"ppo.score={FUNCTION}")])
def test_what_a_stage_does_not_read_may_change(place, stage, override):
    opened(stage, override)
    replace_weights(place)
    edit_function(place)
    opened(stage, override)


def test_a_hub_id_and_what_is_not_there_have_no_digest(place):
    for override in ("model.init=owner/model", "model.init=models/none"):
        assert contents.contents("sft", load_config("configs/tiny.yaml", [override])) == {}
    assert contents.contents("ppo", load_config("configs/tiny.yaml", ["ppo.score=no_such_module:f"])) == {}


def test_a_run_of_an_earlier_version_goes_on(place):
    manifest = opened("sft", f"model.init={MODEL}").folder / "manifest.json"
    noted = json.loads(manifest.read_text())
    assert noted.pop("contents").keys() == {f"model.init={MODEL}"}
    manifest.write_text(json.dumps(noted))
    replace_weights(place)
    opened("sft", f"model.init={MODEL}")
    assert json.loads(manifest.read_text())["contents"]  # from here on it is noticed


def test_a_start_that_came_to_nothing_does_not_bind_the_model(place):
    config = load_config("configs/tiny.yaml", ["run.dir=run", f"model.init={MODEL}"])
    open_stage("sft", config)
    replace_weights(place)
    open_stage("sft", config)


def test_a_function_is_followed_to_the_file_that_defines_it(place, monkeypatch):
    (place / "front_of_mine.py").write_text("from scores_of_mine import f\n")
    opened("ppo", "ppo.score=front_of_mine:f")
    edit_function(place)
    with pytest.raises(InputError, match="what ppo.score=front_of_mine:f names has changed"):
        opened("ppo", "ppo.score=front_of_mine:f")


def test_an_object_that_can_be_called_stands_in_the_file_of_its_module(place):
    (place / "scores_of_mine.py").write_text("import functools\nf = functools.partial(max, 1)\n")
    assert contents.contents("ppo", load_config("configs/tiny.yaml", [f"ppo.score={FUNCTION}"])).keys() == {f"ppo.score={FUNCTION}"}


def test_a_folder_is_what_is_loaded_from_it(place):
    folder, before = place / "models/m", model_digest(place / "models/m")
    (folder / "README.md").write_text("about it")
    (folder / ".cache").mkdir()
    shutil.copytree(folder, place / "elsewhere")
    assert model_digest(folder) == model_digest(place / "elsewhere") == before
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (place / "elsewhere" / name).write_text("other")
        assert model_digest(place / "elsewhere") != before, name
    assert model_digest(folder / "model.safetensors") != before and model_digest(place / "none") is None


@pytest.mark.parametrize("where", [0, 50_000, 99_999])
def test_of_a_large_file_blocks_are_read_from_its_beginning_to_its_end(tmp_path, monkeypatch, where):
    monkeypatch.setattr(contents, "WHOLE", 1000)
    monkeypatch.setattr(contents, "BLOCK", 100)
    monkeypatch.setattr(contents, "BLOCKS", 11)  # at 0, 9,990, ..., 49,950, ..., 99,900
    content = bytearray(random.Random(1).randbytes(100_000))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    before = model_digest(path)
    content[where] ^= 1
    path.write_bytes(content)
    assert model_digest(path) != before
