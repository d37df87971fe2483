"""CANON A4: what is no number never reaches the weights. It is planted in every place where a number comes from, once and all the time:
once, the step is left out and counted; all the time, the stage stops (exit code 3) and names what it was learning from."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file

import rlhf.learner
import rlhf.passes
import rlhf.ppo
import rlhf.scoring
import stages.pretrain
from rlhf import trl_trainers
from rlhf.config import load_config
from rlhf.errors import EXIT_STOPPED, InputError, TrainingStopped
from rlhf.jsonl import read_jsonl
from stages import collect, ppo, prepare, pretrain, reward, sft

SMALL = ("world.documents=150", "world.demonstrations=100", "world.prompts=100", "world.test_prompts=10", "pretrain.steps=20",
         "pretrain.batch_tokens=512", "sft.batch_size=8", "sft.microbatch=8", "sft.lr=1e-2", "collect.prompts=80", "collect.eval_prompts=4",
         "reward.batch_size=5", "reward.microbatch=5", "reward.normalise_prompts=8", "ppo.rollouts=3",
         "ppo.batch_size=8", "ppo.minibatches=2", "ppo.eval_prompts=4", "ppo.warmup_rollouts=0", "ppo.ptx_coef=0.1", "ppo.kl_target=2",
         "run.precision=fp32")
MAIN = {"pretrain": pretrain.main, "sft": sft.main, "reward": reward.main, "ppo": ppo.main}


def config_of(folder, *more):
    return load_config("configs/tiny.yaml", [f"run.dir={folder}", *SMALL, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run as it is before ppo."""
    folder = tmp_path_factory.mktemp("numbers") / "run"
    for stage in (prepare, pretrain, sft, collect, reward):
        stage.main(config_of(folder))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A function stage -> a run folder in which it comes next."""
    def before(stage):
        for name in ("prepare", "data", "pretrain", "sft", "collect", "reward"):
            if name == stage:
                break
            (tmp_path / name).symlink_to(whole / name)
        return tmp_path

    return before


def spoiled(value, poison):
    """`value` with its first tensor multiplied by the poison, gradient and all."""
    if isinstance(value, tuple):
        return (spoiled(value[0], poison), *value[1:])
    return value * poison


class Planted:
    """A function whose result is no number in one call (always: in all)."""

    def __init__(self, function, poison, call, always):
        self.function, self.poison, self.call, self.always, self.calls = function, poison, call, always, 0

    def __call__(self, *arguments, **how):
        self.calls += 1
        value = self.function(*arguments, **how)
        return spoiled(value, self.poison) if self.always or self.calls == self.call else value


class PlantedGradient(Planted):
    """In front of what clips gradients: one element of one of them is no number."""

    def __call__(self, accelerator, model, *rest):
        self.calls += 1
        if self.always or self.calls == self.call:
            next(p for p in model.parameters() if p.grad is not None).grad.flatten()[-1] = self.poison
        return self.function(accelerator, model, *rest)


PLACES = {  # name: (stage, module, attribute, call that is spoiled when one is); what it returns, or the first of it, is spoiled
    "pretrain loss": ("pretrain", stages.pretrain, "_loss", 2),
    "sft logits": ("sft", trl_trainers, "policy_pass", 2),
    "sft loss": ("sft", trl_trainers.DemonstrationTrainer, "compute_loss", 2),
    "reward-stage loss": ("reward", trl_trainers, "ranking_loss", 2),
    "logits": ("ppo", rlhf.passes, "output_logprobs", 3),  # after policy and reference on held-out prompts
    "reference logits": ("ppo", rlhf.passes, "output_logprobs", 4),
    "value": ("ppo", rlhf.passes.ValueModel, "forward", 2),
    "advantages": ("ppo", rlhf.rollout, "gae", 4),  # after the held-out prompts, the rollout, and its returns for where the values start
    "policy loss": ("ppo", rlhf.ppo, "policy_loss", 2),
    "value loss": ("ppo", rlhf.ppo, "value_loss", 2),
    "ptx loss": ("ppo", rlhf.ppo, "language_model_loss", 2),
    "gradient": ("ppo", rlhf.ppo, "_clip", 2),
}


def plant(monkeypatch, place, poison, always):
    stage, where, name, call = PLACES[place]
    planted = (PlantedGradient if place == "gradient" else Planted)(getattr(where, name), poison, call, always)
    monkeypatch.setattr(where, name, lambda *arguments, **how: planted(*arguments, **how))
    return stage


def finite(folder):
    return all(torch.isfinite(t).all() for file in folder.rglob("*.safetensors") for t in load_file(file).values())


@pytest.mark.parametrize("place", PLACES)
def test_A4_planted_once_it_is_left_out_counted_and_never_saved(run, monkeypatch, capsys, place):
    folder = run(PLACES[place][0])
    stage = plant(monkeypatch, place, math.nan, always=False)
    MAIN[stage](config_of(folder))
    rows = list(read_jsonl(folder / stage / "metrics.jsonl"))
    assert sum(row.get("skipped_steps", 0) for row in rows) >= 1
    assert finite(folder / stage / "model")
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("place", PLACES)
def test_A4_planted_all_the_time_the_stage_stops_and_names_what_it_learned_from(run, monkeypatch, place):
    folder = run(PLACES[place][0])
    stage = plant(monkeypatch, place, math.inf, always=True)
    with pytest.raises(TrainingStopped) as stopped:
        MAIN[stage](config_of(folder))
    assert stopped.value.exit_code == EXIT_STOPPED
    named = re.search(r"ids ([0-9a-f]{6,}.*)|text begins with '(.+)'", str(stopped.value))
    assert named, stopped.value
    assert not (folder / stage / "model").exists() and not (folder / stage / "DONE").exists() and finite(folder / stage)


def scores_of_a_callable(prompts, completions):
    return [math.inf if i == 1 else 0.5 for i in range(len(prompts))]


@pytest.mark.parametrize("place", ["reward model output", "callable"])
def test_A4_a_score_that_is_no_number_stops_ppo_and_names_its_prompt(run, monkeypatch, place):
    folder = run("ppo")
    more = [f"ppo.score={__name__}:scores_of_a_callable"] if place == "callable" else []
    if not more:
        monkeypatch.setattr(rlhf.scoring, "raw_scores", Planted(rlhf.scoring.raw_scores, math.nan, 1, always=True))
    with pytest.raises(TrainingStopped, match="scores are not finite, for prompt ids [0-9a-f]{6,}"):
        ppo.main(config_of(folder, *more))
    assert not (folder / "ppo" / "model").exists()


def test_A4_adapter_weights_that_are_no_numbers_stop_ppo(run, monkeypatch):
    plain = rlhf.learner.add_lora

    def spoil(*arguments):
        model = plain(*arguments)
        next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(math.nan)
        return model

    monkeypatch.setattr(rlhf.learner, "add_lora", spoil)
    folder = run("ppo")
    with pytest.raises(TrainingStopped):
        ppo.main(config_of(folder, "model.lora_rank=2", "ppo.score=tests.test_numbers:half"))
    assert not (folder / "ppo" / "model").exists()


def half(prompts, completions):
    return [0.5] * len(prompts)


@pytest.mark.parametrize("row", ['"margin": NaN', '"margin": Infinity', '"margin": 1e999'])
def test_A4_a_data_row_whose_number_is_none_is_dropped_or_refused(tmp_path, row):
    """The rows beside it are kept, and nothing that is no number reaches the canonical data."""
    good = '{"prompt": "What is %d?", "chosen": "It is %d.", "rejected": "No idea.", "margin": 0.5}\n'
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(good % (i, i) for i in range(60)) + '{"prompt": "Why?", "chosen": "So.", "rejected": "No.", ' + row + "}\n")
    try:
        prepare.main(config_of(tmp_path / "run", f"data.preferences={file}"))
    except InputError as error:
        assert str(file) in str(error)
        return
    rows = [r for split in ("train", "eval", "test") for r in read_jsonl(tmp_path / "run" / "data" / "preferences" / f"{split}.jsonl")]
    assert len(rows) >= 60 and all(math.isfinite(r.get("margin") or 0.0) for r in rows)
