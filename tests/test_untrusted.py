"""Files that somebody else made: no pickle in them is opened, no code run, no path followed out of the run folder, and nothing that they say is
obeyed by a browser or a terminal."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch

import rlhf.models
from rlhf.checkpoints import load_checkpoint, save_checkpoint
from rlhf.cli import guarded
from rlhf.config import load_config
from rlhf.errors import InputError
from rlhf.learner import Learner
from rlhf.models import load_encoder, load_policy, load_reward_model, save_model
from rlhf.ppo import MovingAverage
from rlhf.progress import say
from rlhf.runs import open_stage
from rlhf.scoring import load_scorer
from stages import prepare
from stages.compare import check_settings
from tests.helpers import cpu, nano, tiny_encoder
from tests.test_report import ATTACK, make_report, make_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


# Pickles

@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt"])
@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_a_model_folder_with_a_pickle_is_refused_and_not_opened(tmp_path, tiny_folder, tiny_encoder, load, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError, match="model.safetensors"):
        load(str(folder), tiny_encoder, "eager")
    with pytest.raises(InputError):
        load_scorer([folder], "mean", 0.0, "eager", "cpu")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    """Whatever accelerate wrote as a pickle is put in place of by a trap; ours is a safetensors file."""
    accelerator, model = cpu(), nano(tiny_encoder())
    kept = {"best": MovingAverage(model, 0.0)}
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    stage = open_stage("prepare", load_config("configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"]))
    save_checkpoint(accelerator, stage, 1, 1, kept)
    pickles = [p for p in stage.checkpoints.rglob("*") if p.suffix in (".bin", ".pkl", ".pt", ".pth")]
    assert pickles and not list(stage.checkpoints.rglob("custom_checkpoint*"))
    for path in pickles:
        path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        with contextlib.suppress(Exception):
            load_checkpoint(accelerator, stage, kept)
    assert not (tmp_path / "sprung").exists()


# Code

def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    encoder = tiny_encoder()
    for load in (load_policy, load_reward_model):
        with pytest.raises(InputError):
            load(str(folder), encoder, "eager")
    load_encoder(str(folder))  # tokenizer.json needs no code
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_ppo_trusts_code_where_the_config_does(tmp_path, tiny_folder, monkeypatch, asked):
    encoder, plain, trusted = tiny_encoder(), rlhf.models._load, []
    for place in ("sft", "reward", "other"):
        model = (load_policy if place == "sft" else load_reward_model)(str(tiny_folder), encoder, "eager")
        save_model(model, encoder, tmp_path / place / "model")

    def note(auto_class, source, **settings):
        trusted.append(settings["trust_remote_code"])
        return plain(auto_class, source, **settings)

    monkeypatch.setattr(rlhf.models, "_load", note)
    mix = f"ppo.mix={json.dumps({str(tmp_path / 'other' / 'model'): 0.5})}"
    config = load_config("configs/tiny.yaml", [f"run.dir={tmp_path}", f"model.trust_remote_code={json.dumps(asked)}", mix])
    Learner(config, cpu(), encoder)
    assert len(trusted) > 10 and set(trusted) == {asked}


# Paths

def test_no_path_in_a_data_file_leaves_the_run_folder(tmp_path):
    place = tmp_path / "deep" / "er" / "run"
    rows = [{"id": f"../../../escaped{i}", "prompt": f"../../../escaped {i}?", "completion": f"/etc/escaped {i}", "family": "../../x"}
            for i in range(60)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(load_config("configs/tiny.yaml", [f"run.dir={place}", f"data.demonstrations={file}"]))
    assert {p.name for p in tmp_path.iterdir()} == {"mine.jsonl", "deep"}
    assert {p.name for p in place.parent.iterdir()} == {"run"} == {p.name for p in place.parent.parent.iterdir()} - {"er"} | {"run"}


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "round_1/../../elsewhere"])
def test_no_policy_named_in_a_config_lies_outside_the_run_folder(tmp_path, name):
    config = load_config("configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}", f"compare.policies=[{name}]"])
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere" / "DONE").write_text("{}")
    with pytest.raises(InputError, match=f"compare.policies: found '{name}'"):
        check_settings(config)


# Browsers and terminals

def seen_by_a_browser(page) -> str:
    """The document after its scripts ran."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_a_script_in_a_completion_and_does_not_run_it(tmp_path):
    samples = make_samples(20)
    for row in samples:
        row["answers"]["ppo"]["text"] = ATTACK
    make_report(tmp_path, samples)
    document = seen_by_a_browser(tmp_path / "report.html")
    assert "<title>run</title>" not in document and "&lt;script&gt;document.title='run'&lt;/script&gt;" in document
    bare = tmp_path / "bare.html"
    bare.write_text(f"<!doctype html><title>before</title>{ATTACK.partition('<img')[0]}")
    assert "<title>run</title>" in seen_by_a_browser(bare)  # a browser that runs nothing would see nothing


def test_control_sequences_of_data_are_not_said(capsys):
    say("prepare: \x1b]0;title\x07mine\x1b[2J.jsonl")

    def refuse():
        raise InputError("\x1b[31mmine.jsonl\x1b[0m:3: not JSON")

    assert guarded(refuse) == 2
    said = capsys.readouterr()
    assert said.out == "prepare: mine.jsonl\n" and said.err == "error: mine.jsonl:3: not JSON\n"
