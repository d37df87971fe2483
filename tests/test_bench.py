"""`rlhf bench`: it times the stage's own step, its figures follow from each other, and what it cannot do ends with one message.

With RLHF_TRL_PEER naming a folder that holds trl 1.12 the real peer takes part; without it that test is skipped.
"""

import json
import os
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf.learner
from rlhf import bench, bench_sweep
from rlhf.bench_sweep import AXES, as_markdown, linear
from rlhf.charts import Series, line_chart, standalone
from rlhf.compute import start
from rlhf.config import config_to_tree, load_config, replace_section
from rlhf.jsonl import read_jsonl, write_json, write_jsonl
from rlhf.learner import Learner
from rlhf.models import load_encoder, load_policy, load_reward_model, parameter_count, save_model
from rlhf.prompts import load_prompts, prompts_of_step
from stages import ppo

SMALL = ["ppo.batch_size=8", "ppo.minibatches=2", "data.max_completion_tokens=6", "run.threads=1", "run.precision=fp32",
         "model.context=256"]
PROMPTS = [f"What is {n} plus two{' please' * (n % 3)}?" for n in range(20)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder, _tiny_gpt) -> Path:
    """A run folder with finished prepare, sft and reward stages, as small as they come."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    save_model(_tiny_gpt, tiny_encoder, folder / "sft" / "model")
    torch.manual_seed(3)
    save_model(load_reward_model(str(folder / "sft" / "model"), tiny_encoder, "eager"), tiny_encoder, folder / "reward" / "model")
    for split in ("train", "eval"):
        write_jsonl(folder / "data" / "prompts" / f"{split}.jsonl",
                    ({"prompt": [{"role": "user", "content": text}], "id": f"{split}{i}"} for i, text in enumerate(PROMPTS)))
    config = load_config("configs/tiny.yaml", SMALL)
    for stage in ("prepare", "sft", "reward"):
        write_json(folder / stage / "DONE", {})
        write_json(folder / stage / "config.yaml", config_to_tree(config))
    load_prompts(str(folder), "train", load_encoder(str(folder / "sft" / "model")), config.data.max_prompt_tokens)  # leaves its table, as stages do
    return folder


def files(folder: Path) -> dict:
    """When every file was changed; tables of encoded rows aside, which whoever reads the data first makes."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "encoded" not in p.parts}


def ends(capsys, code: int, *words: str) -> tuple[str, str]:
    """What `rlhf bench WORDS` says on both streams; it must end with `code` and without a traceback."""
    assert bench.main([*words]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert code == 0 or (out == "" and err.startswith("error: ") and err.count("error: ") == 1)
    return out, err


# What is measured

@pytest.mark.parametrize(("device", "waits"), [("cuda", 0.2), ("cpu", 0.0)])
def test_an_update_lasts_until_a_gpu_has_done_its_last_optimizer_step(run, monkeypatch, device, waits):
    config = bench.run_config(run, [])
    learner = Learner(config, start(config), load_encoder(str(run / "sft" / "model")))
    learner.accelerator = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(rlhf.learner, "update", lambda *given, **settings: {})  # a GPU takes its work and returns at once
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: time.sleep(0.2))
    learner.learn(None, step=1)
    assert waits <= learner.clock.take()["seconds_update"] < waits + 0.1


def test_json_alone_is_on_standard_output_and_its_figures_follow_from_each_other(run, capsys):
    before = files(run)
    out, _ = ends(capsys, 0, "--run", str(run), "--steps", "1", "--json", "ppo.epochs=3")
    found = json.loads(out)
    seconds = found["seconds"]
    assert set(seconds) == {*bench.PHASES, "other", "step"} and all(s > 0 for s in seconds.values())
    assert sum(seconds.values()) - seconds["step"] == pytest.approx(seconds["step"]), "one step: its phases and the rest are the whole"
    assert seconds["other"] < 0.2 * seconds["step"]
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / seconds["step"])
    # 6 operations a parameter and token, three epochs over the rollout
    assert found["update_rate"] == pytest.approx(6 * found["parameters"] * found["tokens"] * 3 / seconds["update"])
    assert found["update_product_share"] == pytest.approx(found["update_rate"] / found["product_rate"])
    assert found["sampling"]["ratio"] == pytest.approx(found["sampling"]["tokens_per_second"] / found["sampling"]["generate_tokens_per_second"])
    assert set(found["passes"]) == {"old", "reference", "value"}
    assert found["peak_memory_mb"] > 100 and len(found["steps"]) == 1 and "ppo_step_ratio" not in found
    assert files(run) == before, "a bench leaves a run as it was"


@pytest.mark.parametrize(("value_model", "names"), [("separate", ["old", "reference", "value"]), ("shared", ["old", "reference"])])
def test_the_passes_of_the_forward_phase_are_timed_one_after_another(run, value_model, names):
    config = load_config("configs/tiny.yaml", [*SMALL, f"ppo.value_model={value_model}", f"run.dir={run}"])
    encoder = load_encoder(str(run / "sft" / "model"))
    learner = Learner(config, start(config), encoder)
    rows = prompts_of_step(load_prompts(str(run), "train", encoder, 96), 0, 8, config.seed)
    plain, asked = learner.ref_logprobs, []

    def slow(batch):
        asked.append(len(batch.ids_BT))
        time.sleep(0.2)
        return plain(batch)

    learner.ref_logprobs = slow
    found = bench.passes(learner, rows)
    assert list(found) == names and found["reference"] > 0.2 > max(found["old"], found.get("value", 0)) > 0
    assert sum(asked) == 4 * 8, "three rounds and one that is left out, all eight rows in each"


def test_the_table_names_every_phase(run, capsys):
    out, _ = ends(capsys, 0, "--run", str(run), "--steps", "1", "model.lora_rank=2")
    for words in ("sample ", "score ", "old, reference, values ", "reference 0.", "update ", "whole step ", "LoRA rank 2", "generate", "peak memory",
                  "products"):
        assert words in out


def test_the_timed_step_is_the_stages_step(run, tmp_path):
    """The first rollout of the ppo stage and the first step here: the same completions, scores and update."""
    config = load_config("configs/tiny.yaml", [*SMALL, "ppo.rollouts=3", "ppo.warmup_rollouts=0", f"run.dir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    for part in ("data", "sft", "reward", "prepare"):
        (tmp_path / "run" / part).symlink_to(run / part)
    ppo.main(config)
    first = next(read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl"))
    config = replace_section(config, "run", dir=str(run))
    encoder = load_encoder(str(run / "sft" / "model"))
    learner = Learner(config, start(config), encoder)
    rows = prompts_of_step(load_prompts(str(run), "train", encoder, 96), 0, 8, config.seed)
    found = bench.timed_step(learner, rows, 0)
    assert (found["score_mean"], found["length_mean"]) == (pytest.approx(first["score_mean"]), pytest.approx(first["length_mean"]))
    assert found["seconds"] >= sum(found[f"seconds_{phase}"] for phase in bench.PHASES)
    assert found["tokens"] == sum(len(p.ids) for p in rows) + round(8 * found["length_mean"])


def test_P12_with_lora_the_saved_policy_is_fp32_though_what_is_frozen_is_held_in_bf16_and_shared(run):
    """SFT's weights as they are on disk, and the adapters' product added: B·A times alpha over rank."""
    config = load_config("configs/tiny.yaml", [*SMALL, "run.precision=bf16", "model.lora_rank=2", "model.lora_alpha=6", f"run.dir={run}"])
    encoder = load_encoder(str(run / "sft" / "model"))
    learner = Learner(config, start(config), encoder)
    layer = learner.policy.get_base_model().transformer.h[1].mlp.c_fc
    lora_a, lora_b = (adapter["default"].weight for adapter in (layer.lora_A, layer.lora_B))
    torch.nn.init.normal_(lora_b, std=0.3)
    sft = load_policy(str(run / "sft" / "model"), encoder, "eager").transformer.h[1].mlp.c_fc.weight
    saved = learner.policy_to_save().merge_and_unload().transformer.h[1].mlp.c_fc.weight
    torch.testing.assert_close(saved, sft + 3 * (lora_b @ lora_a).T)
    assert layer.base_layer.weight.dtype == torch.bfloat16 and saved.dtype == torch.float32
    assert (saved - sft).abs().max() > 0.1 and torch.equal(lora_b, layer.lora_B["default"].weight)  # and the one in use keeps its adapters
    value, reward = learner.model.value_model.trunk.h[0].attn.c_attn.base_layer.weight, learner.scorer.model.transformer.h[0].attn.c_attn.weight
    assert value.data_ptr() == reward.data_ptr() and value.dtype == torch.bfloat16


def test_no_more_rows_are_sampled_at_once_than_microbatches_allow_and_answers_stay_the_same(run, monkeypatch):
    at_once, completions = [], []
    plain = rlhf.learner.sample
    monkeypatch.setattr(rlhf.learner, "sample", lambda *args: (at_once.append(args[5]), plain(*args))[1])
    encoder = load_encoder(str(run / "sft" / "model"))
    rows = prompts_of_step(load_prompts(str(run), "train", encoder, 96), 0, 8, 1)
    widest = max(len(p.ids) for p in rows) + 32
    for tokens in (8192, widest // 4):  # of which 16 are 4 rows
        config = load_config("configs/tiny.yaml", [*SMALL, "run.precision=fp32", "data.max_completion_tokens=32", f"ppo.microbatch_tokens={tokens}",
                                                   f"run.dir={run}"])
        completions.append(Learner(config, start(config), encoder).roll(rows, 0.1, 1, 0).completions)
    assert at_once == [16 * 8192 // widest, 16 * (widest // 4) // widest] and at_once[1] < len(rows) < at_once[0]
    assert completions[0] == completions[1]


# What a person can get wrong

def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    _, err = ends(capsys, 2, "--run", str(tmp_path / "none"))
    assert f"rlhf pipeline run.dir={tmp_path / 'none'}" in err


def test_an_unfinished_stage_is_named_with_its_command(run, tmp_path, capsys):
    for part in ("data", "sft", "prepare"):
        (tmp_path / part).symlink_to(run / part)
    _, err = ends(capsys, 2, "--run", str(tmp_path))
    assert "bench needs the finished stage reward" in err and "python -m stages.reward" in err


def test_a_mistyped_setting_names_the_nearest(run, capsys):
    _, err = ends(capsys, 2, "--run", str(run), "ppo.batchsize=3")
    assert "batch_size" in err


def fake_trl(folder: Path, version: str, code: str | None = None) -> Path:
    """A folder as pip would leave it, with nothing of TRL but its name, its version and a module that runs `code`."""
    (folder / f"trl-{version}.dist-info").mkdir(parents=True)
    (folder / f"trl-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    if code is not None:
        for package in ("trl", "trl/experimental", "trl/experimental/ppo"):
            (folder / package).mkdir()
            (folder / package / "__init__.py").write_text(code if package.endswith("ppo") else "")
    return folder


def test_a_peer_folder_without_the_right_trl_is_refused_with_the_command_that_fills_it(run, tmp_path, capsys):
    for folder, found in ((tmp_path / "empty", "no trl"), (fake_trl(tmp_path / "new", "1.16.0", ""), "trl 1.16.0"),
                          (fake_trl(tmp_path / "without", "1.12.0"), "trl 1.12.0")):
        _, err = ends(capsys, 2, "--run", str(run), "--peer", str(folder))
        assert f"found {found} there" in err and f"pip install --no-deps --target {folder} trl==1.12.0" in err


def test_a_run_that_the_peer_cannot_train_is_refused(run, tmp_path, capsys):
    _, err = ends(capsys, 2, "--run", str(run), "--peer", str(fake_trl(tmp_path / "trl", "1.12.0", "")), "ppo.score=my:f")
    assert "one reward model" in err


def test_a_peer_that_ends_says_why(run, tmp_path, capsys):
    folder = fake_trl(tmp_path / "trl", "1.12.0", "raise ImportError('transformers has no such thing')")
    _, err = ends(capsys, 2, "--run", str(run), "--peer", str(folder), "--steps", "1")
    assert "ended with exit code 1: ImportError: transformers has no such thing" in err


@pytest.mark.skipif("RLHF_TRL_PEER" not in os.environ, reason="RLHF_TRL_PEER names no folder with trl 1.12")
def test_the_real_peer_takes_the_same_steps(run, capsys):
    out, _ = ends(capsys, 0, "--run", str(run), "--peer", os.environ["RLHF_TRL_PEER"], "--steps", "2", "--json")
    found = json.loads(out)
    assert found["ppo_step_ratio"] == pytest.approx(found["peer"]["seconds"] / found["seconds"]["step"])
    assert len(found["peer"]["steps"]) == len(found["peer"]["score_means"]) == 2 and found["peer"]["peak_memory_mb"] > 100


# Sampling compared: which tokens count

def test_tokens_count_up_to_and_with_the_first_end(tiny_encoder):
    end = tiny_encoder.eos_id
    assert tiny_encoder.until_end([7, 8, end, end, 9]) == [7, 8, end]
    assert tiny_encoder.until_end([end, 7]) == [end]
    assert tiny_encoder.until_end([7, 8]) == [7, 8]


# The sweep

def test_a_line_by_hand():
    assert linear([(0, 1), (1, 3), (2, 5)]) == (pytest.approx(1), pytest.approx(2), pytest.approx(0))
    # least squares through (0, 0), (1, 3), (2, 0): the level 1; 3 is farthest from it, 200 %
    assert linear([(0, 0), (1, 3), (2, 0)]) == (pytest.approx(1), pytest.approx(0), pytest.approx(2))


def test_a_sweep_times_every_point_with_its_own_settings_and_leaves_charts_and_a_table(run, tmp_path, capsys, monkeypatch):
    asked = []

    def timed(folder, settings, steps):
        config = bench.run_config(folder, settings)  # every point is one that `rlhf bench` takes
        asked.append((config.ppo.batch_size, config.data.max_completion_tokens, steps))
        size = parameter_count(load_policy(str(folder / "sft" / "model"), load_encoder(str(folder / "sft" / "model")), "eager"))
        tokens = config.ppo.batch_size * 10
        return {"parameters": size, "tokens": tokens, "seconds": dict.fromkeys((*bench.PHASES, "step"), tokens / 1000), "tokens_per_second": 1000.0,
                "length_mean": 3.0, "update_product_share": 0.1, "peak_memory_mb": 1234, "sampling": {"ratio": 2.5}}

    monkeypatch.setattr(bench_sweep, "_timed", timed)
    monkeypatch.setattr(bench_sweep, "MODELS", ("nano",))
    ends(capsys, 0, "--run", str(run), "--sweep", str(tmp_path / "speed"), "--steps", "2")
    assert asked == [(b, 6, 2) for b in bench_sweep.BATCHES] + [(8, n, 2) for n in bench_sweep.LENGTHS] + [(8, 6, 2)]
    points = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert [p["axis"] for p in points] == ["batch"] * 5 + ["length"] * 4 + ["size"]
    table = (tmp_path / "speed" / "speed.md").read_text()
    assert "| ppo.batch_size | 256 | 2,560 |" in table and "0.00 s + 1.000 s per 1,000 real tokens" in table and "0% off" in table
    for axis in AXES:
        ElementTree.parse(tmp_path / "speed" / f"{axis}.svg")
    assert as_markdown(points) == table


def test_a_chart_of_its_own_is_an_svg_file_whose_colours_are_all_there():
    text = standalone(line_chart("x", "A title", [Series("a", [1, 2], [3, 4], slot) for slot in ("sft", "ppo", "extra-1")]))
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    for slot in ("sft", "ppo", "extra-1", "sans"):
        assert f"var(--{slot})" in text and f"--{slot}:" in text
