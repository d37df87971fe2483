"""Stages 1 and 2 on tiny models: what the trainers compute, from its definition; learning on rules with a known optimum; resume to the bit."""

import dataclasses
import gc
import json
import logging
import math
import random
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rlhf import quiet, trl_trainers
from rlhf.config import config_from_tree
from rlhf.encoding import Encoder
from rlhf.errors import InputError, TrainingStopped
from rlhf.jsonl import read_jsonl, write_jsonl
from rlhf.models import init_reward_head, load_encoder, load_policy, load_reward_model, new_gpt, save_model, train_tokenizer
from rlhf.rankings import (
    clustered_interval,
    collate_rankings,
    encode_rankings,
    evaluate_rankings,
    judge_share,
    normalisation,
    pair_figures,
    with_flips,
)
from rlhf.runs import file_digest
from rlhf.scoring import raw_scores
from rlhf.trl_trainers import DemonstrationTrainer, RankingTrainer, Recipe, count_steps, last_checkpoint, length_grouped_order
from rlhf.workers import Workers
from stages import reward, sft
from tests.helpers import KeepsFigures, gradients_of_steps

THINGS = ["red", "blue", "green", "gold", "grey", "pink"]
MANNERS = ["", " please", " if you would be so kind"]


def _prompt(rng):
    return [{"role": "user", "content": f"Say {rng.choice(THINGS)} and {rng.choice(THINGS)}" + "!" * rng.randrange(3)}]


def _ranking(rng, number):
    """The rule: an answer that says thanks beats one that does not, whatever else stands in it."""
    answers = [f"{rng.choice(THINGS)}{rng.choice(MANNERS)}{' thanks' * polite} {rng.choice(THINGS)}" for polite in (0, 1, 1, 0)[: 2 + number % 3]]
    ranks = [1 if "thanks" in a else 2 for a in answers]
    return {"prompt": _prompt(rng), "completions": answers, "ranks": ranks, "gold": [float(2 - r) for r in ranks], "id": f"{number:016x}"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder with data and a backbone, as prepare, pretrain and collect leave it."""
    run, rng = tmp_path_factory.mktemp("start"), random.Random(1)
    torch.manual_seed(1)
    encoder = Encoder(train_tokenizer([f"Say {a} and {b} thanks" + m for a in THINGS for b in THINGS for m in MANNERS], 300))
    save_model(new_gpt("nano", encoder, 64, "eager"), encoder, run / "pretrain" / "model")
    for split, size in (("train", 320), ("eval", 40)):
        prompts = [_prompt(rng) for _ in range(size)]
        echo = [{"prompt": p, "completion": p[0]["content"].removeprefix("Say ").strip("!"), "id": f"{i:016x}"} for i, p in enumerate(prompts)]
        write_jsonl(run / "data" / "demonstrations" / f"{split}.jsonl", echo)
        write_jsonl(run / "data" / "prompts" / f"{split}.jsonl", [{"prompt": r["prompt"], "id": r["id"]} for r in echo])
        write_jsonl(run / "data" / "preferences" / f"{split}.jsonl", [_ranking(rng, i) for i in range(size)])
    for stage in ("prepare", "pretrain", "collect"):
        (run / stage).mkdir(exist_ok=True)
        (run / stage / "DONE").write_text("{}")
    return run


@pytest.fixture()
def run(start, tmp_path) -> Path:
    """A run folder of its own for the test, sharing what never changes."""
    for name in ("data", "prepare", "pretrain", "collect"):
        (tmp_path / name).symlink_to(start / name)
    return tmp_path


def _config(folder: Path, **sections):
    tree = {"run": {"dir": str(folder), "threads": 1, "precision": "fp32", "save_every": 1000}, "data": {"max_completion_tokens": 24},
            "model": {"size": "nano", "context": 256},
            "sft": {"epochs": 3, "batch_size": 32, "microbatch": 32, "lr": 5e-3},
            "reward": {"batch_size": 16, "microbatch": 16, "lr": 2e-3, "normalise_prompts": 32}}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return config_from_tree(tree, "test")


@pytest.fixture(scope="module")
def trained(start):
    """RUN/sft of the default test configuration, made once."""
    sft.main(_config(start))
    return start


@pytest.fixture()
def after_sft(run, trained) -> Path:
    (run / "sft").symlink_to(trained / "sft")
    return run


def _fresh_reward_model(start, seed=3):
    encoder = load_encoder(str(start / "pretrain" / "model"))
    model = load_reward_model(str(start / "pretrain" / "model"), encoder, "eager").eval()
    init_reward_head(model, torch.Generator().manual_seed(seed))
    return model, encoder


def _some_rankings(start, count):
    encoder = load_encoder(str(start / "pretrain" / "model"))
    made = encode_rankings(list(read_jsonl(start / "data" / "preferences" / "train.jsonl"))[:count], encoder, 96, 64, "drop")
    return [row for row in made if isinstance(row, dict)]


# --- rankings: numbers by hand -------------------------------------------------------------------------------------------------


def test_R1_head_is_normal_with_std_one_over_root_d_plus_one():
    model = BertForSequenceClassification(BertConfig(vocab_size=30, hidden_size=1024, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                                     num_labels=1))
    with torch.no_grad():
        model.classifier.bias.fill_(7.0)
    head = init_reward_head(model, torch.Generator().manual_seed(0))
    assert head is model.classifier
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert abs(head.weight.mean().item()) < 4 / 1025
    assert head.bias.item() == 0


def test_head_is_exact_under_bf16(start):
    model, encoder = _fresh_reward_model(start)
    hidden = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.score(hidden)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, hidden @ model.score.weight.T, rtol=1e-6, atol=1e-6)


def test_R5_normalisation_by_hand():
    gain, bias = normalisation(torch.tensor([1.0, 3.0, 5.0, 7.0]))  # mean 4, variance 5
    assert gain == pytest.approx(1 / math.sqrt(5)) and bias == pytest.approx(-4 / math.sqrt(5))
    raw = torch.randn(50) * 3 - 2
    gain, bias = normalisation(raw)
    scores = gain * raw + bias
    assert scores.mean().item() == pytest.approx(0, abs=1e-6) and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert normalisation(torch.full((4,), 2.5)) == (1.0, -2.5)
    with pytest.raises(ValueError, match="not finite"):
        normalisation(torch.tensor([1.0, float("nan")]))


def test_judge_share_is_a_pure_share_of_the_ids():
    ids = [f"{i * 7919:016x}" for i in range(4000)]
    kept = [judge_share(i, 0.4) for i in ids]
    assert 0.37 < sum(kept) / len(ids) < 0.43
    assert kept == [judge_share(i, 0.4) for i in ids]
    assert not any(judge_share(i, 0.0) for i in ids) and all(judge_share(i, 1.0) for i in ids)
    assert all(judge_share(i, 0.6) for i, k in zip(ids, kept, strict=True) if k), "a larger share only adds prompts"
    odd = [k for i, k in zip(ids, kept, strict=True) if int(i, 16) % 2]
    assert 0.35 < sum(odd) / len(odd) < 0.45, "independent of the id's own bits, by which splits are made"


def test_R7_flips_turn_round_the_given_share_of_rankings_and_nothing_else():
    rows = [{"id": f"{i:x}", "ranks": [2, 1, 3], "gold": [0.5, 1.0, 0.0]} for i in range(4000)]
    noisy = with_flips(rows, 0.25)
    turned = [row["ranks"] == [2, 3, 1] for row in noisy]
    assert 0.23 < sum(turned) / len(rows) < 0.27
    assert all(row["ranks"] == [2, 1, 3] for row, is_turned in zip(noisy, turned) if not is_turned)
    assert all(row["gold"] == [0.5, 1.0, 0.0] for row in noisy) and all(row["ranks"] == [2, 1, 3] for row in rows)
    assert with_flips(rows, 0.0) == rows
    assert with_flips([{"id": "a", "ranks": [1, 2, 2, 3]}], 1.0) == [{"id": "a", "ranks": [3, 2, 2, 1]}], "ties stay ties"
    judged = [judge_share(row["id"], 0.25) for row in rows]
    assert sum(a and b for a, b in zip(judged, turned)) < 0.1 * len(rows), "not the prompts that the judge keeps"


def test_encode_rankings_leaves_out_and_counts():
    class Words:
        def prompts_ids(self, conversations):
            return [[1] * len(messages[0]["content"].split()) for messages in conversations]

        def completions_ids(self, texts):
            return [[2] * len(text.split()) + [9] for text in texts]

    def row(prompt, completions, ranks, **more):
        return {"prompt": [{"role": "user", "content": prompt}], "completions": completions, "ranks": ranks, **more}

    rows = [row("a b", ["x", "x y", "x y z w"], [2, 1, 3], gold=[0.1, 0.2, 0.3]), row("a b c d", ["x", "y"], [1, 2]), row("a", ["x", "y"], [1, 1]),
            row("a", ["x", "x y z w"], [1, 2]), row("a", ["x", "y"], [2, 1], margin=0.5)]
    made = encode_rankings(rows, Words(), 3, 4, "drop")
    assert made[1:4] == ["prompt over data.max_prompt_tokens", "all tied", "completion over data.max_completion_tokens"]
    kept = [made[0], made[4]]
    assert kept[0] == {"prompt": [1, 1], "completions": [[2, 9], [2, 2, 9]], "ranks": [2, 1], "margin": 0.0, "gold": [0.1, 0.2], "id": None,
                       "longest": 5, "length": 7, "left_out": 1}
    assert kept[1]["margin"] == 0.5 and kept[1]["gold"] is None and kept[1]["left_out"] == 0
    assert encode_rankings(rows, Words(), 3, 4, "half")[2]["ranks"] == [1, 1], "a tie is a pair when it counts half"


def test_R6_evaluation_by_hand():
    rows = [{"completions": [[1], [1, 2], [1, 2, 3]], "ranks": [1, 2, 2], "margin": 0.0, "gold": [1.0, 0.5, 0.2]},
            {"completions": [[1, 2], [1]], "ranks": [2, 1], "margin": 0.0, "gold": None},
            {"completions": [[1, 2], [3, 4]], "ranks": [1, 2], "margin": 0.0, "gold": [0.3, 0.3]}]
    scores = [[2.0, 1.0, 3.0], [0.5, 0.5], [0.0, -2.0]]
    found = evaluate_rankings(rows, scores)
    # pairs (better - worse): 2-1 right, 2-3 wrong; 0.5-0.5 half; 0+2 right
    assert found["pairs"] == 4 and found["accuracy"] == pytest.approx(2.5 / 4)
    # longer wins: 1<2 and 1<3 wrong, 1<2 wrong, 2=2 half
    assert found["longer_wins_accuracy"] == pytest.approx(0.5 / 4)
    # gold pairs: 1>0.5 right, 1>0.2 wrong, 0.5>0.2 wrong (1 < 3); the equal golds make none
    assert found["noise_free_pairs"] == 3 and found["noise_free_accuracy"] == pytest.approx(1 / 3)

    def loss(difference):
        return math.log1p(math.exp(-difference))

    assert found["loss"] == pytest.approx(((loss(1) + loss(-1)) / 2 + loss(0) + loss(2)) / 3, rel=1e-6)
    assert [(b["margin_from"], b["margin_to"], b["pairs"]) for b in found["by_margin"]] == [(0, 0, 1), (1, 1, 1), (1, 1, 1), (2, 2, 1)]
    # predicted: sigmoid(0) = 0.5 and sigmoid(1) = 0.73 twice (one right, one wrong), sigmoid(2) = 0.88
    assert [(round(b["predicted"], 2), b["observed"], b["pairs"]) for b in found["calibration"]] == [(0.5, 0.5, 1), (0.73, 0.5, 2), (0.88, 1.0, 1)]


def test_R6_interval_counts_prompts_and_not_pairs():
    right = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    alone = clustered_interval(right, torch.arange(10))
    repeated = clustered_interval(right.repeat_interleave(6), torch.arange(10).repeat_interleave(6))
    assert repeated == pytest.approx(alone, abs=1e-9), "six copies of each pair add nothing"
    # Wilson by hand at m = 0.7 with n = 9 (the n - 1 of the sample variance)
    z2 = 1.959963984540054**2
    centre, half = (0.7 + z2 / 18) / (1 + z2 / 9), math.sqrt(z2 / 9 * 0.21 + (z2 / 18) ** 2) / (1 + z2 / 9)
    assert alone == pytest.approx((centre - half, centre + half), abs=1e-9)
    low, high = clustered_interval(torch.ones(40), torch.arange(20).repeat_interleave(2))
    assert high == pytest.approx(1.0) and 0.8 < low < 0.95, "all right is not certainty"


def test_R6_rows_of_the_same_prompt_are_one_draw():
    """Votes on pairs come a row each, many of them to one prompt: six rows of a pair say what one row with six pairs says."""
    right = [True, True, False, True, False, True, True, True, True, False]
    rows = [{"completions": [[1], [2]], "ranks": [1, 2], "margin": 0.0, "gold": None, "id": f"{prompt:x}"} for prompt in range(10) for _ in range(6)]
    found = evaluate_rankings(rows, [[float(right[int(row["id"], 16)]), 0.5] for row in rows])
    # Wilson by hand at m = 0.7 with n = 9 (the n - 1 of the sample variance), not 60
    z2 = 1.959963984540054**2
    centre, half = (0.7 + z2 / 18) / (1 + z2 / 9), math.sqrt(z2 / 9 * 0.21 + (z2 / 18) ** 2) / (1 + z2 / 9)
    assert found["pairs"] == 60 and found["ci95"] == pytest.approx([centre - half, centre + half], abs=1e-9)


def test_R6_interval_covers_the_truth():
    generator, truth, covered = torch.Generator().manual_seed(0), 0.7, 0
    for _ in range(400):
        skill = (torch.rand(60, 1, generator=generator) < 0.5) * 0.4 + 0.5  # prompts are easy or hard: pairs of one go together
        right = (torch.rand(60, 6, generator=generator) < skill).float()
        low, high = clustered_interval(right.flatten(), torch.arange(60).repeat_interleave(6))
        covered += low <= truth <= high
    assert 0.91 < covered / 400 < 0.98


def test_pair_figures_by_hand():
    rewards, ranks = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 9.0]]), torch.tensor([[2, 1, 3], [1, 2, 0]])
    # first: 3>1 right (gap 2), 3>2 right (gap 1), 1<2 wrong (gap -1); second: a tie of rewards, the third place is empty
    assert [x.item() for x in pair_figures(rewards, ranks)] == [2.5, 4, 2.0]


# --- rankings through a model --------------------------------------------------------------------------------------------------


def _unpadded(model, prompt, completion):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion])).logits[0, 0].item()


def _batch_loss(model, rankings, pad_id):
    from rlhf.losses import ranking_loss

    batch = collate_rankings(rankings, pad_id)
    with torch.no_grad():
        rewards = model(input_ids=batch["ids_NT"], attention_mask=batch["mask_NT"].long()).logits[:, 0][batch["places_BK"]]
    total, count = ranking_loss(rewards, batch["ranks_BK"], batch["margin_B"])
    return (total / count).item()


def test_R4_k_way_loss_is_the_mean_over_prompts_of_their_mean_pair_loss(start):
    model, encoder = _fresh_reward_model(start)
    rankings = _some_rankings(start, 7)
    assert {len(r["completions"]) for r in rankings} == {2, 3, 4}
    by_prompt = []
    for r in rankings:
        scores = [_unpadded(model, r["prompt"], c) for c in r["completions"]]
        pairs = [math.log1p(math.exp(scores[j] - scores[i])) for i in range(len(scores)) for j in range(len(scores)) if r["ranks"][i] < r["ranks"][j]]
        by_prompt.append(sum(pairs) / len(pairs))
    assert _batch_loss(model, rankings, encoder.pad_id) == pytest.approx(sum(by_prompt) / len(by_prompt), abs=1e-5)


def test_R4_loss_does_not_depend_on_the_order_of_the_answers(start):
    model, encoder = _fresh_reward_model(start)
    rankings, rng = _some_rankings(start, 9), random.Random(5)
    shuffled = []
    for r in rankings:
        order = rng.sample(range(len(r["ranks"])), len(r["ranks"]))
        shuffled.append({**r, "completions": [r["completions"][i] for i in order], "ranks": [r["ranks"][i] for i in order]})
    assert shuffled != rankings
    assert _batch_loss(model, shuffled, encoder.pad_id) == pytest.approx(_batch_loss(model, rankings, encoder.pad_id), abs=1e-6)


def test_R2_scores_do_not_depend_on_padding_and_read_the_eos(start):
    model, encoder = _fresh_reward_model(start)
    rankings = _some_rankings(start, 12)
    rows = [r["prompt"] + c for r in rankings for c in r["completions"]]
    alone = torch.tensor([_unpadded(model, row, []) for row in rows])
    assert len({len(row) for row in rows}) > 3
    torch.testing.assert_close(raw_scores(model, rows, encoder.pad_id), alone, rtol=0, atol=1e-5)
    without_end = raw_scores(model, [row[:-1] for row in rows], encoder.pad_id)
    assert (without_end - alone).abs().min() > 1e-4, "the score is read at the end token"


# --- the order of the rows -----------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_per_pass_with_little_padding():
    lengths = [random.Random(i).randrange(5, 60) for i in range(640)]
    order = length_grouped_order(lengths, 16, 40, seed=4)
    assert sorted(order) == list(range(640))
    assert order == length_grouped_order(lengths, 16, 40, seed=4) != length_grouped_order(lengths, 16, 40, seed=5)

    def padding(rows):
        return sum(16 * max(lengths[i] for i in rows[s : s + 16]) for s in range(0, 640, 16)) / sum(lengths)

    assert padding(order) < 1.15 < 1.5 < padding(range(640))
    twice = length_grouped_order(lengths, 16, 100, seed=4)
    assert len(twice) == 1600 and {twice.count(i) for i in range(640)} == {2, 3}
    assert len(length_grouped_order([3, 4, 5], 8, 2, seed=0)) == 16, "fewer rows than a step needs"


def test_count_steps():
    assert count_steps(8000, 64, 1.0) == 125 and count_steps(100, 64, 2.0) == 3 and count_steps(3, 64, 1.0) == 1 and count_steps(8000, 64, 0.5) == 62


# --- gradients: microbatches change nothing, losses are what they are said to be ------------------------------------------------


def _demonstrations(start, count):
    encoder = load_encoder(str(start / "pretrain" / "model"))
    rows = list(read_jsonl(start / "data" / "demonstrations" / "train.jsonl"))[:count]
    return [(encoder.prompt_ids(r["prompt"]), encoder.completion_ids(r["completion"])) for r in rows], encoder


def _two_steps(start, folder, kind, microbatch):
    """A trainer of `kind` for two optimizer steps of 8 rows."""
    settings, recipe = _config(folder).run, Recipe("sft", 2, 8, microbatch, 1e-4, "linear", 3, "no")
    if kind == "reward":
        model, encoder = _fresh_reward_model(start)
        return RankingTrainer(model, _some_rankings(start, 30), encoder, recipe, settings, folder)
    rows, encoder = _demonstrations(start, 30)
    policy = load_policy(str(start / "pretrain" / "model"), encoder, "eager")
    return DemonstrationTrainer(policy, rows, encoder, recipe, settings, folder, 0.5 if "prompts" in kind else 0.0)


def _same_but_for_rounding(found, wanted):
    (gradients, lines), (expected, wanted_lines) = found, wanted
    drift, scale = (gradients[0] - expected[0]).abs(), expected[0].abs().max()
    assert drift.max() < 1e-5 * scale and drift.mean() < 1e-6 * scale
    for line, other in zip(lines, wanted_lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5) and line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line.get("accuracy") == other.get("accuracy")


@pytest.mark.parametrize("kind", ["sft", "sft with prompts", "reward"])
def test_P4_microbatches_change_nothing_but_rounding(start, tmp_path, kind):
    whole, *others = (gradients_of_steps(_two_steps(start, tmp_path / str(microbatch), kind, microbatch)) for microbatch in (8, 2, 1))
    for found in others:
        _same_but_for_rounding(found, whole)


@pytest.mark.parametrize("kind", ["sft", "sft with prompts", "reward"])
def test_P4_workers_change_nothing_but_rounding(start, tmp_path, monkeypatch, kind):
    alone = gradients_of_steps(_two_steps(start, tmp_path / "alone", kind, 4))
    monkeypatch.setattr(trl_trainers, "workers_for", lambda accelerator, model: Workers(3))  # a microbatch of 4: two rows, one, one
    _same_but_for_rounding(gradients_of_steps(_two_steps(start, tmp_path / "three", kind, 4)), alone)


@pytest.mark.parametrize("kind", ["sft", "sft with prompts", "reward"])
def test_P4_long_rows_go_in_smaller_parts_on_cpus_and_change_nothing_but_rounding(start, tmp_path, monkeypatch, kind):
    wanted = gradients_of_steps(_two_steps(start, tmp_path / "whole", kind, 8))
    trainer = _two_steps(start, tmp_path / "parts", kind, 8)
    longest = max(trainer.lengths)
    monkeypatch.setattr(trl_trainers, "MOST_CELLS", 2 * longest**2)  # two of the longest, more of shorter ones
    plain, passes = trainer.compute_loss, []
    monkeypatch.setattr(trainer, "compute_loss", lambda model, inputs, **more: passes.append(1) or plain(model, inputs, **more))
    _same_but_for_rounding(gradients_of_steps(trainer), wanted)
    assert len(passes) > 2, "two steps in more than two passes"


def test_rows_are_shared_out_by_the_square_of_the_longest(monkeypatch):
    trainer = SimpleNamespace(lengths=[10, 10, 20, 10, 50, 10])
    monkeypatch.setattr(trl_trainers, "MOST_CELLS", 1200)
    # 2 x 10^2 and 3 x 20^2 fit, 4 x 20^2 does not; 50^2 never does and stands alone
    assert RankingTrainer._parts(trainer, [0, 1, 2, 3, 4, 5], 8) == [[0, 1, 2], [3], [4], [5]]
    assert RankingTrainer._parts(trainer, [0, 1, 3, 5], 3) == [[0, 1, 3], [5]]
    monkeypatch.setattr(trl_trainers, "on_cpu", lambda: False)
    assert RankingTrainer._parts(trainer, [0, 1, 2, 3, 4, 5], 8) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_P4_memory_that_runs_out_halves_the_microbatches_and_changes_nothing_but_rounding(start, tmp_path, monkeypatch, capsys, kind):
    trainers = {size: _two_steps(start, tmp_path / str(size), kind, size) for size in (8, 4)}
    wanted = gradients_of_steps(trainers[8])
    plain, tried = trainers[4].compute_loss, []

    def second_of_four_rows_fails(model, inputs, *args, **kwargs):
        loss = plain(model, inputs, *args, **kwargs)
        rows = len(inputs["mask_BC"] if kind == "sft" else inputs["ranks_BK"])
        tried.append(rows)
        if rows == 4 and len(tried) > 1:  # the first microbatch already left gradients and sums behind, and this one its sums
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(trainers[4], "compute_loss", second_of_four_rows_fails)
    capsys.readouterr()
    _same_but_for_rounding(gradients_of_steps(trainers[4]), wanted)
    assert tried == [4, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # the first step again in halves, the second at once so
    assert capsys.readouterr().out.count("memory ran out: microbatches have at most 2 rows from here on, with the same result (sft.microbatch)") == 1


def test_a_row_that_does_not_fit_into_memory_stops_the_stage(start, tmp_path, monkeypatch):
    trainer = _two_steps(start, tmp_path, "sft", 2)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute_loss", fails)
    with pytest.raises(TrainingStopped, match="at most 1 rows.*sft.microbatch"):
        gradients_of_steps(trainer)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_B3_B5_sft_loss_is_completion_mean_plus_weighted_prompt_mean(start, tmp_path, weight):
    rows, encoder = _demonstrations(start, 8)
    policy = load_policy(str(start / "pretrain" / "model"), encoder, "eager").eval()
    prompt_losses, completion_losses = [], []
    for prompt, completion in rows:
        assert completion[-1] == encoder.eos_id
        ids = torch.tensor(prompt + completion)
        with torch.no_grad():
            losses = F.cross_entropy(policy(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none").tolist()
        prompt_losses += losses[: len(prompt) - 1]
        completion_losses += losses[len(prompt) - 1 :]
    assert len(completion_losses) == sum(len(c) for _, c in rows)
    wanted = sum(completion_losses) / len(completion_losses) + weight * sum(prompt_losses) / len(prompt_losses)
    recipe = Recipe("sft", 1, 8, 4, 1e-4, "linear", 3, "no")
    _, lines = gradients_of_steps(DemonstrationTrainer(policy, rows, encoder, recipe, _config(tmp_path).run, tmp_path, weight))
    assert lines[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_batch_that_cannot_be_shared_out_is_refused(start, tmp_path):
    rows, encoder = _demonstrations(start, 4)
    policy = load_policy(str(start / "pretrain" / "model"), encoder, "eager")
    with pytest.raises(InputError, match="sft.batch_size=10 is not a multiple of sft.microbatch=4"):
        DemonstrationTrainer(policy, rows, encoder, Recipe("sft", 1, 10, 4, 1e-4, "linear", 3, "no"), _config(tmp_path).run, tmp_path)


def test_A4_a_loss_that_is_no_number_is_left_out_even_where_its_gradient_is_one(start, tmp_path, monkeypatch, capsys):
    trainer, weights, log = _two_steps(start, tmp_path, "sft", 8), [], KeepsFigures()
    plain, plain_log = trainer.loss_and_sums, trainer.log

    def second_is_no_number(model, inputs, num_items_in_batch):
        loss, sums = plain(model, inputs, num_items_in_batch)
        return loss, {**sums, "loss": sums["loss"] * (math.nan if weights else 1.0)}

    def remember(logs, start_time=None):
        weights.append(torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()]))
        plain_log(logs, start_time)

    monkeypatch.setattr(trainer, "loss_and_sums", second_is_no_number)
    monkeypatch.setattr(trainer, "log", remember)
    weights_before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.follow(log, 1, "test")
    trainer.run()
    assert [line.get("skipped_steps", 0) for line in log.lines] == [0, 1] and "loss (nan) or gradient of step 2" in capsys.readouterr().out
    assert not torch.equal(weights[0], weights_before) and torch.equal(weights[1], weights[0])


def test_only_expected_messages_of_the_loader_are_dropped():
    def shown(text):
        return quiet._OnPurpose().filter(logging.LogRecord("transformers.modeling_utils", logging.WARNING, "", 0, text, (), None))

    def report(*lines):
        return "\x1b[1mGPT2ForSequenceClassification LOAD REPORT\x1b[0m from: x\nKey | Status | \n----+-----+-\n" + "\n".join(lines) + "\n\nNotes:\n"

    head, left_over, lost = "score.weight | MISSING | ", "lm_head.weight | UNEXPECTED | ", "transformer.h.{0...3}.ln_1.weight | MISSING | "
    assert not shown(report(head)) and not shown(report(left_over, head))
    assert shown(report(head, lost)) and shown(report("score.weight | MISMATCH | "))
    assert shown("some other warning")


# --- stages ---------------------------------------------------------------------------------------------------------------------


def test_sft_halves_the_loss_and_leaves_a_plain_model(trained):
    lines = list(read_jsonl(trained / "sft" / "metrics.jsonl"))
    done = json.loads((trained / "sft" / "DONE").read_text())
    assert done["eval_loss"] < lines[0]["loss"] / 2
    assert [line["step"] for line in lines[:-1]] == list(range(1, 31)), "3 x 320 / 32 = 30 steps"
    folder = trained / "sft" / "model"
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    AutoModelForCausalLM.from_pretrained(folder)
    assert not (trained / "sft" / "checkpoints").exists()
    assert load_encoder(str(folder)).fingerprint() == load_encoder(str(trained / "pretrain" / "model")).fingerprint()


def test_sft_with_lora_is_saved_merged(run, start):
    sft.main(_config(run, model={"lora_rank": 2}, sft={"epochs": 0.3}))
    saved = AutoModelForCausalLM.from_pretrained(run / "sft" / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(start / "pretrain" / "model").state_dict()
    assert saved.keys() == before.keys()
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert any("attn" in name for name in changed) and not any("wte" in name or "ln_" in name for name in changed)


def test_rows_too_long_are_counted_and_none_left_is_refused(run, capsys):
    with pytest.raises(InputError, match="none of 320 demonstrations is short enough"):
        sft.main(_config(run, data={"max_prompt_tokens": 2}))
    assert "320 of 320 train demonstrations left out" in capsys.readouterr().out


def _interrupt_at(monkeypatch, trainer, step):
    plain = trainer.log

    def log(self, logs, start_time=None):
        plain(self, logs, start_time)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "log", log)


def _interrupted(*args):
    raise KeyboardInterrupt


def _without_times(path):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_mb")} for line in read_jsonl(path)]


def test_sft_resumes_to_the_bit(run, trained, monkeypatch):
    config = _config(run, run={"save_every": 4})
    with monkeypatch.context() as patch:
        _interrupt_at(patch, DemonstrationTrainer, 6)
        with pytest.raises(KeyboardInterrupt):
            sft.main(config)
    checkpoints = run / "sft" / "checkpoints"
    assert [p.name for p in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    half_written = checkpoints / "checkpoint-5"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(checkpoints) == (checkpoints / "checkpoint-4", 4)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_eval_loss", _interrupted)  # after the last step, before anything is saved
        with pytest.raises(KeyboardInterrupt):
            sft.main(config)
    assert not (run / "sft" / "model").exists()
    sft.main(config)
    assert file_digest(run / "sft" / "model" / "model.safetensors") == file_digest(trained / "sft" / "model" / "model.safetensors")
    assert _without_times(run / "sft" / "metrics.jsonl") == _without_times(trained / "sft" / "metrics.jsonl")


@pytest.fixture(scope="module")
def rewarded(trained):
    reward.main(_config(trained, reward={"epochs": 1.5}))
    return trained


def test_reward_model_learns_the_rule(rewarded):
    metrics = json.loads((rewarded / "reward" / "metrics.json").read_text())
    found = metrics["eval"]
    assert found["accuracy"] > 0.9 and found["noise_free_accuracy"] == found["accuracy"]
    assert found["ci95"][0] <= found["accuracy"] <= found["ci95"][1]
    ranks = [r["ranks"] for r in read_jsonl(rewarded / "data" / "preferences" / "eval.jsonl")]
    assert found["pairs"] == sum(a < b for row in ranks for a in row for b in row)
    assert sum(b["pairs"] for b in found["by_margin"]) == sum(b["pairs"] for b in found["calibration"]) == found["pairs"]
    assert metrics["members"] == 1 and metrics["train"]["steps"] == 30
    assert found["longer_wins_accuracy"] < 0.85
    low, high = found["bag_of_words_ci95"]
    assert low <= found["bag_of_words_accuracy"] <= high and found["bag_of_words_accuracy"] > 0.9  # the rule is one that words give away


def test_R5_normalisation_travels_in_the_config_and_the_folder_is_plain(rewarded):
    folder = rewarded / "reward" / "model"
    normalised = json.loads((rewarded / "reward" / "metrics.json").read_text())["normalisation"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.score.bias is None
    assert (model.config.reward_gain, model.config.reward_bias) == (normalised["gain"], normalised["bias"])
    config = _config(rewarded, reward={"epochs": 1.5})
    prompts, completions, encoder = reward._sft_samples(config, str(rewarded / "sft" / "model"), _PlainAccelerator())
    rows = [encoder.prompt_ids(p) + c for p, c in zip(prompts, completions, strict=True)]
    scores = normalised["gain"] * torch.tensor([_unpadded(model.eval(), row, []) for row in rows]) + normalised["bias"]
    assert scores.mean().item() == pytest.approx(0, abs=1e-3) and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


class _PlainAccelerator:
    device, num_processes = torch.device("cpu"), 1

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def test_a_reward_model_gets_the_attention_kernel_of_the_device_that_trains_it(after_sft, monkeypatch):
    """A Mac's GPU is not CUDA, and not a CPU either."""
    asked = []

    def stop(source, encoder, attention, *trust):
        asked.append(attention)
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "start", lambda config: SimpleNamespace(device=torch.device("mps")))
    monkeypatch.setattr(reward, "describe", lambda accelerator: "a Mac")
    monkeypatch.setattr(reward, "load_reward_model", stop)
    config = _config(after_sft)
    with pytest.raises(KeyboardInterrupt):
        reward.main(dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto")))
    assert asked == ["sdpa"]


def test_ensemble_resumes_to_the_bit_and_keeps_finished_members(after_sft, monkeypatch):
    run = after_sft
    config = _config(run, run={"save_every": 3}, reward={"members": 2, "epochs": 0.3})  # 6 steps each
    with monkeypatch.context() as patch:
        _interrupt_at(patch, RankingTrainer, 5)
        with pytest.raises(KeyboardInterrupt):
            reward.main(config)
    assert not (run / "reward" / "model").exists()
    with monkeypatch.context() as patch:
        _interrupt_second_member(patch)
        with pytest.raises(KeyboardInterrupt):
            reward.main(config)
    first = (run / "reward" / "model" / "model.safetensors").stat()
    reward.main(config)
    now = (run / "reward" / "model" / "model.safetensors").stat()
    assert (now.st_ino, now.st_mtime_ns) == (first.st_ino, first.st_mtime_ns), "a finished member is not trained again"
    resumed = [file_digest(run / "reward" / name / "model.safetensors") for name in ("model", "model_1")]
    lines = _without_times(run / "reward" / "metrics.jsonl")
    assert [(line["step"], line["member"]) for line in lines[:-1]] == [(s, 0 if s < 7 else 1) for s in range(1, 13)]

    again = run / "again"
    again.mkdir()
    for name in ("data", "prepare", "pretrain", "collect", "sft"):
        (again / name).symlink_to(run / name)
    reward.main(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(again))))
    assert [file_digest(again / "reward" / name / "model.safetensors") for name in ("model", "model_1")] == resumed
    assert resumed[0] != resumed[1], "each member has its own seed"
    assert _without_times(again / "reward" / "metrics.jsonl") == lines


def test_one_member_of_an_ensemble_is_in_memory_at_a_time(after_sft, monkeypatch):
    """No collection by this test: what is kept until the next one comes along makes the third member run out of memory."""
    loaded, alive = [], []

    def load(*how):
        alive.append(sum(model() is not None for model in loaded))
        model = load_reward_model(*how)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reward, "load_reward_model", load)
    monkeypatch.setattr(reward, "_measure", lambda *_: None)
    gc.disable()
    try:
        reward.main(_config(after_sft, reward={"members": 3, "epochs": 0.1}))
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def _interrupt_second_member(patch):
    plain = RankingTrainer.log

    def log(self, logs, start_time=None):
        plain(self, logs, start_time)
        if self.offset and self.state.global_step == 4:
            raise KeyboardInterrupt

    patch.setattr(RankingTrainer, "log", log)


def test_judge_learns_from_prompts_that_the_reward_model_never_saw(after_sft, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "tables"))  # other tests of this file share the run's data, and its tables
    seen = {}
    plain = reward.encode_rankings

    def recording(rows, *args):
        seen.setdefault(len(seen), {row["id"] for row in rows})
        return plain(rows, *args)

    monkeypatch.setattr(reward, "encode_rankings", recording)
    reward.main(_config(after_sft, data={"judge_fraction": 0.5}, reward={"epochs": 0.2}))
    ours, of_both, judges = seen.values()  # the held-out rankings are the same, and encoded once
    assert not ours & judges and len(ours | judges) == 320 and min(len(ours), len(judges)) > 100
    assert len(of_both) == 40
    for stage in ("reward", "judge"):
        assert (after_sft / stage / "DONE").is_file() and (after_sft / stage / "model" / "config.json").is_file()
    assert file_digest(after_sft / "judge/model/model.safetensors") != file_digest(after_sft / "reward/model/model.safetensors")


def test_reward_with_lora_trains_the_head_and_saves_merged(after_sft):
    reward.main(_config(after_sft, model={"lora_rank": 2}, reward={"epochs": 0.3}))
    folder = after_sft / "reward" / "model"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    encoder = load_encoder(str(folder))
    untouched = load_reward_model(str(after_sft / "sft" / "model"), encoder, "eager")
    head = init_reward_head(untouched, torch.Generator().manual_seed(1000)).weight
    assert (model.score.weight - head).abs().max() > 1e-4, "the head was trained from its N(0, 1/sqrt(d + 1)) start"
    assert (model.score.weight - head).abs().max() < 0.1


def test_answers_that_are_left_out_of_rankings_that_stay_are_said(after_sft, tmp_path, capsys):
    """Nothing is lost in silence: of the first 40 rankings ten have one answer of two hundred words among four."""
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "completions": ["one", "two", "word " * 200 if i < 10 else "three", "four"],
             "ranks": [1, 2, 3, 4], "id": f"{i:016x}"} for i in range(40)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config, encoder = _config(after_sft, data={"max_completion_tokens": 50}), load_encoder(str(after_sft / "sft" / "model"))
    kept = reward._rankings(SimpleNamespace(name="reward"), path, encoder, config)
    assert len(kept) == 40 and kept.items_in("completions") == 150
    assert "reward: left out 10 answers longer than data.max_completion_tokens=50 from the 40 eval rankings that stay\n" in capsys.readouterr().out


def test_preferences_that_leave_nothing_are_refused(after_sft):
    with pytest.raises(InputError, match="none of 320 rankings is left for reward"):
        reward.main(_config(after_sft, data={"max_prompt_tokens": 2}))
