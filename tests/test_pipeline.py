"""The whole pipeline on configs/tiny.yaml, its files and schemas (DESIGN), resuming, and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config import load_config
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl
from rlhf.learner import Learner
from rlhf.runs import file_digest
from stages import pipeline

ROOT = Path(__file__).resolve().parent.parent
TINY = "configs/tiny.yaml"
STAGES = ("prepare", "pretrain", "sft", "collect", "reward", "ppo", "compare")


ROLLED: list[tuple[bool, set[str]]] = []  # of every rollout of the fixture's run: whether it was an evaluation, and its prompts' ids


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder, plain = tmp_path_factory.mktemp("runs") / "tiny", Learner.roll

    def watched(learner, rows, kl_coef, *seeds):
        ROLLED.append((seeds == (0, 0), {row.id for row in rows}))
        return plain(learner, rows, kl_coef, *seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "roll", watched)
        pipeline.main(load_config(TINY, [f"run.dir={folder}"]))
    return folder


def launch(*words: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml", "-m"]
    return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def test_every_stage_leaves_its_folder(run):
    for stage in STAGES:
        for name in ("config.yaml", "manifest.json", "DONE"):
            assert (run / stage / name).is_file(), f"{stage}/{name}"
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert (run / stage / "metrics.jsonl").is_file()
        assert (run / stage / "model" / "model.safetensors").is_file()
        assert not list((run / stage).rglob("*.bin")) and not list((run / stage / "model").rglob("*.pkl"))


def test_models_load_with_the_auto_classes(run):
    for stage in ("pretrain", "sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(run / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(run / stage / "model")
        assert tokenizer.chat_template and tokenizer.pad_token_id != tokenizer.eos_token_id
    config = AutoModelForSequenceClassification.from_pretrained(run / "reward" / "model", num_labels=1).config
    assert config.reward_gain > 0 and isinstance(config.reward_bias, float)


def test_summary_and_metrics_have_the_schema_of_the_contract(run):
    summary = json.loads((run / "compare" / "summary.json").read_text())
    assert summary["judge"] == "gold" and summary["n_prompts"] == 40
    for policy in ("pretrained", "sft", "best_of_4", "ppo"):
        assert {"gold_mean", "proxy_mean", "kl_mean", "length_mean", "eos_rate", "distinct_2"} <= summary["policies"][policy].keys()
    row = next(c for c in summary["comparisons"] if (c["a"], c["b"]) == ("ppo", "sft"))
    assert row["wins"] + row["ties"] + row["losses"] == 40
    assert row["win_rate"] == pytest.approx((row["wins"] + row["ties"] / 2) / 40)
    assert row["ci95"][0] <= row["win_rate"] <= row["ci95"][1] and "length_controlled_win_rate" in row
    metrics = json.loads((run / "reward" / "metrics.json").read_text())["eval"]
    assert {"accuracy", "ci95", "pairs", "longer_wins_accuracy"} <= metrics.keys()
    for name in ("report.html", "report.md", "samples.jsonl"):
        assert (run / "compare" / name).stat().st_size > 1000


def test_splits_are_disjoint_by_prompt_in_every_file(run):
    ids = {split: set() for split in ("train", "eval", "test")}
    for kind in ("prompts", "demonstrations"):
        for split in ids:
            ids[split] |= {row["id"] for row in read_jsonl(run / "data" / kind / f"{split}.jsonl")}
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["eval"] and not ids["eval"] & ids["test"]
    ranked = {split: {row["id"] for row in read_jsonl(run / "data" / "preferences" / f"{split}.jsonl")} for split in ("train", "eval")}
    assert ranked["train"] <= ids["train"] and ranked["eval"] <= ids["eval"]


def test_ppo_learns_from_training_prompts_and_is_evaluated_on_those_held_out(run):
    ids = {split: {row["id"] for row in read_jsonl(run / "data" / "prompts" / f"{split}.jsonl")} for split in ("train", "eval")}
    assert {evaluation for evaluation, _ in ROLLED} == {True, False}
    assert all(rolled <= ids["eval" if evaluation else "train"] for evaluation, rolled in ROLLED)


def test_raters_prefer_what_the_gold_score_prefers(run):
    """Noise turns round fewer than a third of the pairs whose gold scores differ."""
    rows = list(read_jsonl(run / "data" / "preferences" / "train.jsonl"))
    pairs = [(row["ranks"][i] - row["ranks"][j], row["gold"][i] - row["gold"][j]) for row in rows for i in range(len(row["ranks"])) for j in range(i)]
    right = [rank * gold < 0 for rank, gold in pairs if rank and gold]
    assert len(right) > 100 and sum(right) > 2 / 3 * len(right)


def test_rollouts_are_kept_as_text(run):
    rows = list(read_jsonl(run / "ppo" / "rollouts" / "00001.jsonl"))
    assert len(rows) == 32 and {"prompt", "completion", "score", "id", "gold"} <= rows[0].keys()


def test_step_0_has_no_kl_and_the_first_ratios_are_1(run):
    """CANON A1, A2, P8: nothing has moved yet, and sampling, old log-probabilities and update agree (bf16 may round)."""
    rows = [row for row in read_jsonl(run / "ppo" / "metrics.jsonl") if "first_ratio_error" in row]
    assert rows[0]["kl"] == 0.0 and rows[0]["kl_k3"] == 0.0
    assert all(row["first_ratio_error"] < 0.05 for row in rows)


def test_a_finished_pipeline_is_not_run_again(run, capsys):
    before = file_digest(run / "ppo" / "model" / "model.safetensors")
    pipeline.main(load_config(TINY, [f"run.dir={run}"]))
    said = capsys.readouterr().out
    assert "already done" in said and str((run / "compare" / "report.html").resolve()) in said
    headline = (run / "compare" / "report.md").read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
    assert f"compare: already done: {headline}" in said  # a command that had nothing left to do says what was found all the same
    assert file_digest(run / "ppo" / "model" / "model.safetensors") == before


@pytest.mark.parametrize("setting", ["model.init", "reward.init"])
def test_a_model_that_is_not_there_is_told_before_anything_is_prepared(tmp_path, setting):
    with pytest.raises(InputError, match="no-such-model"):
        pipeline.main(load_config(TINY, [f"run.dir={tmp_path / 'run'}", f"{setting}={tmp_path / 'no-such-model'}"]))
    assert not (tmp_path / "run").exists()


def test_another_experiment_is_refused_and_nothing_written_over(run):
    before = {path: path.stat().st_mtime_ns for path in (run / "ppo").rglob("*")}
    done = launch("stages.ppo", "--config", TINY, f"run.dir={run}", "ppo.lr=0.5")
    assert done.returncode == 2
    assert "ppo.lr was 0.0002 and is now 0.5" in done.stderr and "Traceback" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (run / "ppo").rglob("*")}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_a_resumed_stage_ends_with_the_weights_of_one_that_never_stopped(run, tmp_path, stage, threads, monkeypatch):
    """Stopped right after a checkpoint half way; the same command goes on; fp32, so to the bit; with two threads, two workers share a step."""
    import stages.ppo
    import stages.pretrain

    module = getattr(stages, stage)
    settings = ["run.precision=fp32", "run.save_every=20", "ppo.save_every=2", f"run.threads={threads}"]
    folders = {}
    for name in ("whole", "stopped"):
        folder = folders[name] = tmp_path / name
        subprocess.run(["cp", "-r", str(run), str(folder)], check=True)
        for old in (stage, "compare"):
            subprocess.run(["rm", "-r", str(folder / old)], check=True)
        config = load_config(TINY, [f"run.dir={folder}", *settings])
        if name == "stopped":
            save = module.save_checkpoint

            def save_and_stop(*args, save=save, **kwargs):
                save(*args, **kwargs)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(module, "save_checkpoint", save_and_stop)
                module.main(config)
            assert not (folder / stage / "DONE").exists()
        module.main(config)
    digests = {name: file_digest(folder / stage / "model" / "model.safetensors") for name, folder in folders.items()}
    assert digests["whole"] == digests["stopped"]
    steps = {name: [row["step"] for row in read_jsonl(folder / stage / "metrics.jsonl")] for name, folder in folders.items()}
    assert steps["whole"] == steps["stopped"]


def wants_something_odd(prompts, completions):
    return [float(len(c) % 3) for c in completions]


@pytest.mark.parametrize("hand_over", ["last", "best"])
def test_the_best_weights_are_kept_and_handed_over_when_asked_for(run, tmp_path, hand_over):
    """Steps far too large at a high price of KL: the best held-out evaluation is the SFT model's own."""
    import stages.ppo

    for name in ("prepare", "data", "pretrain", "sft", "collect", "reward"):
        (tmp_path / name).symlink_to(run / name)
    config = load_config(TINY, [f"run.dir={tmp_path}", f"ppo.score={__name__}:wants_something_odd", "ppo.lr=0.02", "ppo.kl_coef=5",
                                "ppo.eval_every=1", "ppo.warmup_rollouts=0", "ppo.rollouts=3", "ppo.likelihood_coef=0.02",
                                f"ppo.hand_over={hand_over}"])
    stages.ppo.main(config)
    done = json.loads((tmp_path / "ppo" / "DONE").read_text())
    rows = [row for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl") if "eval_objective" in row]
    maximised = [r["eval_score_mean"] - 5 * r["eval_kl"] + 0.02 * r["eval_likelihood"] for r in rows]
    assert len(rows) == 4 and [r["eval_objective"] for r in rows] == pytest.approx(maximised, rel=1e-5)
    assert rows[0]["eval_kl"] == 0.0 and rows[-1]["eval_kl"] > 0.1 and rows[0]["eval_likelihood"] < -1, "each term weighs something"
    assert (done["best_rollout"], done["handed_over"]) == (0, hand_over)
    assert done["best_objective"] == pytest.approx(maximised[0], rel=1e-5) and done["eval_objective"] < done["best_objective"] - 1
    sft, handed = (file_digest(folder / "model" / "model.safetensors") for folder in (run / "sft", tmp_path / "ppo"))
    assert (handed == sft) == (hand_over == "best")
    if hand_over == "last":
        assert file_digest(tmp_path / "ppo" / "best" / "model.safetensors") == sft


def test_a_stage_goes_on_with_other_threads_and_ends_with_the_same_weights_up_to_rounding(run, tmp_path, monkeypatch):
    """run.threads may change during a run: sums over two workers are rounded otherwise than sums over one."""
    import stages.pretrain

    weights = {}
    for name, threads in (("same", 1), ("other", 2)):
        folder = tmp_path / name
        subprocess.run(["mkdir", folder], check=True)
        for stage in ("prepare", "data"):
            (folder / stage).symlink_to(run / stage)
        save, settings = stages.pretrain.save_checkpoint, ["run.precision=fp32", "run.save_every=35", f"run.dir={folder}"]

        def save_and_stop(*args, save=save, **kwargs):
            save(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stages.pretrain, "save_checkpoint", save_and_stop)
            stages.pretrain.main(load_config(TINY, [*settings, "run.threads=1"]))
        stages.pretrain.main(load_config(TINY, [*settings, f"run.threads={threads}"]))
        weights[name] = load_file(folder / "pretrain" / "model" / "model.safetensors")
    assert all((weights["other"][n] - w).abs().max() < 1e-3 * w.abs().max() + 1e-6 for n, w in weights["same"].items())


def test_two_processes_run_every_training_stage(tmp_path):
    """accelerate launch with gloo on the CPU: pretrain, sft, reward and ppo each with two processes."""
    folder = tmp_path / "two"
    done = launch("stages.pipeline", "--config", TINY, f"run.dir={folder}", "run.threads=1", processes=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 processes on cpu" in done.stdout
    assert (folder / "compare" / "DONE").is_file()
