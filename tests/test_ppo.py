"""The PPO update (CANON P3-P12, A1, A4): against a straight-line reference written from the papers' equations, by invariance, and by learning.

The reference runs one unpadded row at a time, knows nothing of masks or microbatches, and is the only place of these tests where a loss is
written out twice.
"""

import dataclasses
import math
import shutil
import subprocess
import sys
import types

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import rlhf.ppo
from rlhf.checkpoints import finished_checkpoints, load_checkpoint, save_checkpoint
from rlhf.config import Config, load_config
from rlhf.errors import TrainingStopped
from rlhf.learner import Learner, check_finite
from rlhf.models import last_norm_gain, load_encoder, load_policy, load_reward_model, save_model
from rlhf.optimizers import linear_lr, set_lr
from rlhf.passes import make_rows
from rlhf.paths import PACKAGE
from rlhf.ppo import MovingAverage, update
from rlhf.prompts import Prompt, prompts_of_step
from rlhf.sampling import draw_uniforms, sample
from rlhf.value import new_value_model, ppo_optimizer
from rlhf.workers import Workers
from stages import ppo as stage
from tests import processes
from tests.helpers import collect, cpu, naive_logprobs, nano, policy_and_value, rough, settings, snapshot, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 12)
PAD = ENCODER.pad_id
KINDS = [("separate", False), ("shared", False), ("separate", True), ("shared", True)]


def share_of_even_ids(completion):
    return sum(i % 2 == 0 for i in completion) / len(completion)


def rollout_of(model, ref=None, **how):
    return collect(cpu(), model, nano(ENCODER, 9) if ref is None else ref, ENCODER, PROMPTS, share_of_even_ids, **how)


def disturbed(rollout, seed=5, old=0.3, values=0.3):
    """The rollout as if the policy and the values had moved since: ratios and clips are then of every kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.where(rollout.mask_BC, torch.randn(rollout.mask_BC.shape, generator=generator), 0.0) for _ in range(2)]
    return dataclasses.replace(rollout, old_logprobs_BC=rollout.old_logprobs_BC + old * noise[0], values_BC=rollout.values_BC + values * noise[1])


def gradients(model, rollout, ptx_rows=(), **changes):
    """Gradients of a single step over the whole rollout, and the figures."""
    recorder = processes.KeepsGradients(model)
    figures = update(cpu(), model, recorder, rollout, settings(minibatches=1, **changes), PAD, seed=0, ptx_rows=ptx_rows)
    return recorder.steps[0], figures


def assert_same_gradients(found, expected, tolerance=1e-5):
    """The largest difference within `tolerance` of the largest gradient of all weights, the mean one within a tenth of that."""
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    differences = torch.cat([(found[n] - expected[n]).abs().flatten() for n in expected])
    assert scale > 1e-3
    assert differences.max() <= tolerance * scale and differences.mean() <= 0.1 * tolerance * scale


def assert_same_curve(found, expected):
    """Losses of every rollout within 1e-3 (the largest drift) and 1e-4 on average, and ratios of 1 at every first minibatch (CANON A1)."""
    drift = torch.tensor([abs(a[name] - b[name]) for a, b in zip(found, expected, strict=True) for name in ("policy_loss", "value_loss")])
    assert drift.max() <= 1e-3 and drift.mean() <= 1e-4
    assert max(figures["first_ratio_error"] for figures in [*found, *expected]) < 1e-4


def straight_line_gradients(model, rollout, value_coef=0.1, clip=0.2, value_clip=0.2, temperature=1.0):
    """PPO eq. 7 and N+ 18, token by token: the mean over all tokens of both losses, by autograd on unpadded rows."""
    model.zero_grad(set_to_none=True)
    terms = []
    for b, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        output = model.policy(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
        trunk = model.value_model.trunk
        hidden = output.hidden_states[-1] if trunk is None else trunk(input_ids=torch.tensor([prompt + completion])).last_hidden_state
        for t, token in enumerate(completion):
            place = len(prompt) + t - 1
            ratio = (torch.log_softmax(output.logits[0, place].float() / temperature, 0)[token] - rollout.old_logprobs_BC[b, t]).exp()
            advantage = rollout.advantages_BC[b, t]
            policy_loss = -torch.minimum(ratio * advantage, ratio.clip(1 - clip, 1 + clip) * advantage)
            value, old, target = model.value_model.head(hidden[0, place])[0], rollout.values_BC[b, t], rollout.returns_BC[b, t]
            held = torch.minimum(torch.maximum(value, old - value_clip), old + value_clip)
            terms.append(policy_loss + value_coef * 0.5 * torch.maximum((value - target) ** 2, (held - target) ** 2))
    (sum(terms) / len(terms)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# The gradient of one step

@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_P3_gradients_are_those_of_the_straight_line_reference(kind, lora):
    model = policy_and_value(ENCODER, kind, lora)
    rollout = disturbed(rollout_of(model))
    found, figures = gradients(model, rollout)
    assert 0.05 < figures["clip_fraction"] < 0.95  # the disturbance is of the kind that matters
    assert_same_gradients(found, straight_line_gradients(model, rollout))


def test_S1_the_update_divides_logits_by_the_temperature():
    model = policy_and_value(ENCODER)
    rollout = disturbed(rollout_of(model, temperature=0.6))
    found, _ = gradients(model, rollout, temperature=0.6)
    assert_same_gradients(found, straight_line_gradients(model, rollout, temperature=0.6))


def test_S1_A1_a_step_samples_and_takes_every_log_probability_at_ppo_temperature(tmp_path, tiny_folder):
    config = load_config("configs/tiny.yaml", [f"run.dir={tmp_path}", "run.precision=fp32", "ppo.score=tests.test_memory:by_length",
                                               "ppo.temperature=0.5", "ppo.minibatches=1", "ppo.warmup_rollouts=0", "data.max_completion_tokens=6"])
    shutil.copytree(tiny_folder, tmp_path / "sft" / "model")
    encoder = load_encoder(str(tiny_folder))
    sft, learner = load_policy(str(tiny_folder), encoder, "eager"), Learner(config, cpu(), encoder)
    asked = [[{"role": "user", "content": f"Say {n}"}] for n in range(6)]
    rows = [Prompt(m, encoder.prompt_ids(m), str(i), None) for i, m in enumerate(asked)]
    rollout = learner.roll(rows, 0.1, 7)
    assert rollout.completions == sample(sft, [p.ids for p in rows], draw_uniforms(6, 6, config.seed, 7), encoder, 0.5, 6)
    expected = [naive_logprobs(sft, p.ids, c, 0.5) for p, c in zip(rows, rollout.completions, strict=True)]
    for found_BC in (rollout.old_logprobs_BC, rollout.ref_logprobs_BC):
        torch.testing.assert_close(found_BC[rollout.mask_BC], torch.tensor([x for row in expected for x in row]), rtol=1e-4, atol=1e-4)
    assert learner.learn(rollout, 0)["first_ratio_error"] < 1e-4


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_P4_microbatches_change_nothing_but_rounding(kind):
    model = policy_and_value(ENCODER, kind)
    rollout = disturbed(rollout_of(model))
    whole, figures = gradients(model, rollout, microbatch_tokens=1_000_000)
    for budget in (1, 40, 90):
        parts, same = gradients(model, rollout, microbatch_tokens=budget)
        assert_same_gradients(parts, whole)
        assert same == pytest.approx(figures, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def whole_curve():
    """Ten rollouts whose minibatches of 8 rows are computed at once."""
    return curve_of_microbatches(8)


def curve_of_microbatches(rows):
    """Ten rollouts whose minibatches of 8 rows are computed `rows` at a time, in the rollout's forward passes too."""
    def groups(lengths, budget, at_least, cost):
        return [list(range(start, min(start + rows, len(lengths)))) for start in range(0, len(lengths), rows)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.ppo, "even_groups", groups)
        patch.setattr(rlhf.rollout, "tight_groups", groups)
        return processes.ten_rollouts(cpu(), "separate")


@pytest.mark.parametrize("rows", [1, 2])
def test_P4_A1_ten_rollouts_in_microbatches_of_1_2_and_8_rows_learn_alike(rows, whole_curve):
    assert_same_curve(curve_of_microbatches(rows), whole_curve)
    moved = [figures["approx_kl"] for figures in whole_curve]
    assert min(moved) > 1e-6 and len(whole_curve) == 10  # something was learned in every rollout


def test_P4_a_minibatch_is_divided_by_its_own_tokens():
    """A long row counts for more than a short one: gradients of two minibatches, weighted by their tokens, are that of both together."""
    model = policy_and_value(ENCODER)
    rollout = disturbed(rollout_of(model))
    seen, original = [], rlhf.ppo._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.ppo, "_step", lambda a, m, o, r, rows, *rest: (seen.append(rows), original(a, m, o, r, rows, *rest))[1])
        recorder = processes.KeepsGradients(model)
        update(cpu(), model, recorder, rollout, settings(minibatches=3), PAD, seed=1)
    tokens = [int(rollout.mask_BC[rows].sum()) for rows in seen]
    assert len(set(tokens)) > 1
    weighted = {n: sum(k * s[n] for k, s in zip(tokens, recorder.steps, strict=True)) / sum(tokens) for n in recorder.steps[0]}
    assert_same_gradients(weighted, gradients(model, rollout)[0])


def test_A4_nan_on_padding_reaches_neither_gradients_nor_figures():
    model = policy_and_value(ENCODER)
    rollout = disturbed(rollout_of(model))
    names = ("old_logprobs_BC", "advantages_BC", "values_BC", "returns_BC")
    poisoned = dataclasses.replace(rollout, **{n: torch.where(rollout.mask_BC, getattr(rollout, n), math.nan) for n in names})
    (clean, figures), (found, same) = gradients(model, rollout), gradients(model, poisoned)
    assert same == figures and all(torch.equal(found[n], clean[n]) for n in clean)


@pytest.mark.parametrize("kind", ["separate", pytest.param("shared", marks=pytest.mark.slow)])
def test_P2_P4_A1_two_processes_make_the_rollout_the_gradients_and_the_curves_of_one(tmp_path, kind):
    """Rows, whitened advantages and figures of one process; gradients to rounding, where memory runs out too; ten rollouts alike."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml", "--main_process_port", "0",
               "-m", "tests.processes", str(tmp_path / "two"), kind]
    launched = subprocess.Popen(command, cwd=PACKAGE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes.main(str(tmp_path / "one"), kind)
    said, _ = launched.communicate(timeout=200)
    assert launched.returncode == 0, said[-3000:]
    one, two = (torch.load(tmp_path / name, weights_only=False) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["rollout"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two["rollout"][name], value, rtol=0, atol=2e-5)
        else:
            assert two["rollout"][name] == value
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-3, abs=1e-4)
    assert one["figures"]["first_ratio_error"] < 1e-4 and two["figures"]["first_ratio_error"] < 1e-4
    assert len(one["steps"]) == len(two["steps"]) == 2
    for found, again, expected in zip(two["steps"], two["steps_again"], one["steps"], strict=True):
        assert_same_gradients(found, expected)
        assert_same_gradients(again, expected)  # one process alone halved its microbatches
    assert_same_curve(two["curve"], one["curve"])
    for found in (two["sft"], two["sft_again"]):
        assert_same_gradients(dict(enumerate(found[0])), dict(enumerate(one["sft"][0])))
        assert [line["loss"] for line in found[1]] == pytest.approx([line["loss"] for line in one["sft"][1]], rel=1e-5)


# What the update reports

def shifted(rollout, log_ratio_BC):
    """The rollout with old log-probabilities such that the policy's ratios are exp(log_ratio)."""
    return dataclasses.replace(rollout, old_logprobs_BC=torch.where(rollout.mask_BC, rollout.old_logprobs_BC - log_ratio_BC, 0.0))


def test_figures_by_hand():
    model = policy_and_value(ENCODER)
    rollout = rollout_of(model)
    wide = torch.zeros_like(rollout.old_logprobs_BC)
    wide[:, 0] = math.log(1.5)  # one token of each row
    _, figures = gradients(model, shifted(rollout, wide))
    tokens = int(rollout.mask_BC.sum())
    assert figures["clip_fraction"] == pytest.approx(12 / tokens, rel=1e-4)
    assert figures["approx_kl"] == pytest.approx(12 * (0.5 - math.log(1.5)) / tokens, rel=1e-3)
    first = rollout.advantages_BC[:, 0]
    others = rollout.advantages_BC.sum() - first.sum()
    assert figures["policy_loss"] == pytest.approx(-float(others + torch.minimum(1.5 * first, 1.2 * first).sum()) / tokens, rel=1e-3)
    error = (rollout.values_BC - rollout.returns_BC)[rollout.mask_BC]
    assert figures["value_loss"] == pytest.approx(float(0.5 * (error ** 2).mean()), rel=1e-4)
    assert (figures["skipped_steps"], figures["epochs_run"]) == (0, 1)


@pytest.mark.parametrize("budget", [1, 60, 1_000_000])
def test_A1_ratio_error_is_the_largest_and_drift_the_mean_of_the_minibatch_whatever_the_microbatches(budget):
    model = policy_and_value(ENCODER)
    rollout = rollout_of(model)
    one = torch.zeros_like(rollout.old_logprobs_BC)
    one[3, 0], one[5, 0] = math.log(2.0), math.log(1.5)
    figures = gradients(model, shifted(rollout, one), microbatch_tokens=budget)[1]
    assert figures["first_ratio_error"] == pytest.approx(1.0, abs=1e-3)
    assert figures["first_ratio_drift"] == pytest.approx((1.0 + 0.5) / int(rollout.mask_BC.sum()), abs=1e-4)


# A1 and P12 over real steps

@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_A1_P12_ratio_is_1_at_every_rollouts_first_minibatch_and_the_reference_stays(kind, lora):
    accelerator = cpu()
    model, ref = policy_and_value(ENCODER, kind, lora), None if lora else nano(ENCODER)
    rows = make_rows(PROMPTS, [[40, 41, ENCODER.eos_id]] * 12, PAD, "cpu")
    of_reference = rlhf.rollout.reference(ref, model.policy, 1.0, accelerator.autocast)
    before, before_weights = of_reference(rows), None if lora else snapshot(ref)
    base = {n: p for n, p in snapshot(model.policy).items() if lora and "lora" not in n}
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, 3e-3, 3e-3))
    for step in range(3):
        rollout = collect(accelerator, model, ref, ENCODER, PROMPTS, share_of_even_ids, seed=step)
        figures = update(accelerator, model, optimizer, rollout, settings(epochs=2, microbatch_tokens=70), PAD, seed=step)
        assert figures["first_ratio_error"] < 1e-4 and figures["approx_kl"] > 1e-6
    assert rollout.statistics(ENCODER)["kl_k3"] > 1e-3  # the policy did move
    torch.testing.assert_close(of_reference(rows), before, rtol=0, atol=1e-5 if lora else 0)
    for name, weight in base.items():
        assert torch.equal(dict(model.policy.named_parameters())[name], weight)
    if not lora:
        assert all(torch.equal(p, before_weights[n]) for n, p in ref.named_parameters())


@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_A1_lr_0_for_five_rollouts_leaves_weights_and_ratios(kind, lora):
    accelerator = cpu()
    model, ref = policy_and_value(ENCODER, kind, lora), None if lora else nano(ENCODER)
    before = snapshot(model)
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, 0.0, 0.0))
    for step in range(5):
        rollout = collect(accelerator, model, ref, ENCODER, PROMPTS, share_of_even_ids, seed=step)
        figures = update(accelerator, model, optimizer, rollout, settings(epochs=2), PAD, seed=step)
        assert figures["first_ratio_error"] < 1e-4 and figures["approx_kl"] < 1e-8 and figures["clip_fraction"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_value_model_learns_alone_while_policy_coef_is_0():
    model = policy_and_value(ENCODER)
    before = snapshot(model)
    rollout = rollout_of(model)
    optimizer = ppo_optimizer(model, 1e-3, 1e-3)
    losses = [update(cpu(), model, optimizer, rollout, settings(policy_coef=0.0, value_clip=10.0), PAD, seed=i)["value_loss"] for i in range(6)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[f"policy.{n}"]) for n, p in model.policy.named_parameters())


# P5: epochs, minibatches, learning rate, clipping

@pytest.mark.parametrize("ptx_rows", [(), ((PROMPTS[0], [7, 8, 9]),)])
def test_P4_microbatches_side_by_side_give_the_gradients_of_one_after_the_other(ptx_rows):
    model = policy_and_value(ENCODER)
    rollout = disturbed(rollout_of(model))
    alone, expected = gradients(model, rollout, ptx_rows, microbatch_tokens=100, ptx_coef=2.0)
    recorder = processes.KeepsGradients(model)
    figures = update(cpu(), model, recorder, rollout, settings(minibatches=1, microbatch_tokens=100, ptx_coef=2.0), PAD, seed=0, ptx_rows=ptx_rows,
                     workers=Workers(3))
    assert_same_gradients(recorder.steps[0], alone, 1e-7)
    assert figures == pytest.approx(expected, rel=1e-6)


def test_P4_P9_ptx_rows_keep_to_the_microbatch_and_give_the_same_gradients(monkeypatch):
    model = policy_and_value(ENCODER)
    rollout, ptx_rows = disturbed(rollout_of(model)), [(PROMPTS[i], [7, 8, 9 + i]) for i in range(6)]
    expected, figures = gradients(model, rollout, ptx_rows, microbatch_tokens=1000, ptx_coef=2.0)
    plain, sizes = rlhf.ppo._ptx_loss, []

    def note(accelerator, model, pairs, *rest):
        sizes.append(len(pairs))
        return plain(accelerator, model, pairs, *rest)

    monkeypatch.setattr(rlhf.ppo, "_ptx_loss", note)
    found, again = gradients(model, rollout, ptx_rows, microbatch_tokens=1, ptx_coef=2.0)  # a row at a time
    assert sizes == [1] * 6
    assert_same_gradients(found, expected, 1e-6)
    assert again == pytest.approx(figures, rel=1e-5)


def rows_of_steps(monkeypatch, seed, ptx_rows=(), **changes):
    """Which rows (and ptx rows) each optimizer step of an update sees."""
    seen = []

    def note(accelerator, model, optimizer, rollout, rows, ptx, *rest):
        seen.append((rows, ptx))
        return dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_drift", "ptx_loss", "ratio_error"), 0.0), 1.0

    monkeypatch.setattr(rlhf.ppo, "_step", note)
    optimizer = types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    rollout = types.SimpleNamespace(prompts=PROMPTS, completions=PROMPTS)
    update(types.SimpleNamespace(num_processes=1), None, optimizer, rollout, settings(**changes), PAD, seed, ptx_rows)
    return seen


def test_P5_every_epoch_sees_every_row_once_in_a_fresh_order(monkeypatch):
    steps = [rows for rows, _ in rows_of_steps(monkeypatch, 1, epochs=3, minibatches=4)]
    assert [len(rows) for rows in steps] == [3] * 12
    epochs = [sum(steps[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert len({tuple(order) for order in [*epochs, range(12)]}) == 4


def test_P5_the_order_follows_from_the_seed(monkeypatch):
    assert rows_of_steps(monkeypatch, 1) == rows_of_steps(monkeypatch, 1) != rows_of_steps(monkeypatch, 2)


def test_P5_learning_rate_falls_linearly_to_0():
    assert [linear_lr(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [linear_lr(s, 10, warmup=0.2) for s in range(10)] == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_P5_each_network_has_its_rate_and_adam_epsilon_is_1e_5():
    model = policy_and_value(ENCODER)
    optimizer = ppo_optimizer(model, 1e-3, 4e-3)
    set_lr(optimizer, 0.5)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rate[id(p)] for p in model.policy.parameters()} == {0.5e-3}
    assert {rate[id(p)] for p in model.value_model.parameters()} == {2e-3}
    assert {(g["eps"], g["weight_decay"], *g["betas"]) for g in optimizer.param_groups} == {(1e-5, 0.0, 0.9, 0.999)}


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_P6_while_the_value_model_warms_up_the_policy_stays_to_the_bit(kind):
    """A trunk that both share would move with the value loss."""
    model = policy_and_value(ENCODER, kind)
    optimizer, before = ppo_optimizer(model, 1e-3, 4e-3, 0.02), snapshot(model)
    set_lr(optimizer, 1.0, still="policy")
    update(cpu(), model, optimizer, rollout_of(model), settings(policy_coef=0.0), PAD, seed=1)
    moved = {name for name, weights in snapshot(model).items() if not torch.equal(weights, before[name])}
    assert moved and all(name.startswith("value_model.") for name in moved)
    set_lr(optimizer, 1.0)
    assert {g["lr"] for g in optimizer.param_groups if g["network"] == "policy"} >= {1e-3}


def test_P5_the_last_norms_gain_has_a_rate_of_its_own_when_asked_for():
    model = policy_and_value(ENCODER)
    torch.nn.init.constant_(model.policy.transformer.ln_f.weight, 2.0)
    optimizer = ppo_optimizer(model, 1e-3, 4e-3, 0.02)
    set_lr(optimizer, 0.5)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in optimizer.param_groups) == sum(1 for _ in model.parameters())  # each weight once
    own = [name for name, p in model.policy.named_parameters() if rates[id(p)] != 0.5e-3]
    assert own == ["transformer.ln_f.weight"] and rates[id(model.policy.transformer.ln_f.weight)] == pytest.approx(0.02)  # half of 0.02 of 2
    assert {rates[id(p)] for p in model.value_model.parameters()} == {2e-3}


def test_P5_the_last_norms_gain_moves_as_one_number():
    model = policy_and_value(ENCODER)
    gain, other = model.policy.transformer.ln_f.weight, model.policy.transformer.h[0].ln_1.weight
    before = torch.tensor([3.0, -4.0]).repeat(len(gain) // 2)
    with torch.no_grad():
        gain.copy_(before)
    optimizer = ppo_optimizer(model, 1e-3, 1e-3, 0.1)
    set_lr(optimizer, 1.0)
    gain.grad = -before.sign()  # each entry alone would grow ...
    gain.grad[0] = 100.0 * len(gain)  # ... but a longer gain is worse: 3 times this outweighs 3.5 times the rest
    other_before, other.grad = other.detach().clone(), torch.randn(len(other))
    optimizer.step()
    # Adam's first step is the rate (0.1 of the root mean square 12.5 ** 0.5) against the sign: of that, what lies along the gain
    assert (gain / before).tolist() == pytest.approx([1 - 0.1 * 12.5**0.5 * 3.5 / 12.5] * len(gain), rel=1e-5)
    assert (other - other_before).abs().tolist() == pytest.approx([1e-3] * len(other), rel=0.01)


def test_the_last_norm_is_found_in_other_architectures_and_left_alone_with_lora():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    llama, neox = LlamaForCausalLM(LlamaConfig(**sizes)), GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    assert last_norm_gain(llama) is llama.model.norm.weight and last_norm_gain(neox) is neox.gpt_neox.final_layer_norm.weight
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16))
    assert last_norm_gain(opt) is opt.model.decoder.final_layer_norm.weight
    lora = policy_and_value(ENCODER, lora=True)
    assert len(ppo_optimizer(lora, 1e-3, 1e-3, 0.02).param_groups) == len(ppo_optimizer(lora, 1e-3, 1e-3).param_groups)


def test_P5_gradients_are_clipped_each_network_by_itself_and_the_norm_is_told_from_before():
    model = policy_and_value(ENCODER)
    rollout = disturbed(rollout_of(model))

    def norm(grads, part):
        return math.sqrt(sum(float((g.double() ** 2).sum()) for n, g in grads.items() if n.startswith(part)))

    free, figures = gradients(model, rollout, max_grad_norm=1e9)
    norms = {part: norm(free, part) for part in ("policy.", "value_model.")}
    assert figures["grad_norm"] == pytest.approx(max(norms.values()), rel=1e-4)
    limit = sum(norms.values()) / 2  # between the two
    held, same = gradients(model, rollout, max_grad_norm=limit)
    assert same["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-4)
    for part, before in norms.items():
        assert norm(held, part) == pytest.approx(min(before, limit), rel=1e-3)


# A4: what is not finite

@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_A4_a_step_whose_gradient_is_not_finite_is_left_out_and_counted(poison):
    model = policy_and_value(ENCODER)
    rollout = rollout_of(model)
    before = snapshot(model)
    advantages = rollout.advantages_BC.clone()
    advantages[4, 0] = poison
    after_steps = []
    figures = update(cpu(), model, ppo_optimizer(model, 1e-3, 1e-3), dataclasses.replace(rollout, advantages_BC=advantages),
                     settings(minibatches=1), PAD, seed=1, after_step=lambda: after_steps.append(1))
    assert figures["skipped_steps"] == 1 and after_steps == []
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    told = []
    figures = update(cpu(), model, ppo_optimizer(model, 1e-3, 1e-3), dataclasses.replace(rollout, advantages_BC=advantages),
                     settings(minibatches=2), PAD, seed=1, on_skip=told.append)
    [rows] = told
    assert 4 in rows and len(rows) == len(PROMPTS) // 2
    assert figures["skipped_steps"] == 1  # the other minibatch is good, and is taken
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_A4_a_score_that_is_no_number_stops_the_run_and_names_the_prompt():
    prompts = [types.SimpleNamespace(id=i) for i in ("aaa", "bbb", "ccc")]
    check_finite(torch.tensor([1.0, 2.0, 3.0]), prompts)
    with pytest.raises(TrainingStopped, match="bbb") as caught:
        check_finite(torch.tensor([1.0, math.nan, 3.0]), prompts)
    assert "aaa" not in str(caught.value)


def test_A4_a_run_without_a_finite_step_ends_after_some_rollouts():
    how = types.SimpleNamespace(minibatches=2, kl_target=None, rollouts=30)
    state, folder = {"kl_coef": 0.1, "bad_rollouts": 0}, types.SimpleNamespace(checkpoints="here")
    bad, good = {"skipped_steps": 4, "epochs_run": 2, "kl": 1.0}, {"skipped_steps": 3, "epochs_run": 2, "kl": 1.0}
    for figures in [bad] * 4 + [good] + [bad] * 4:
        state = stage._next_state(state, figures, how, folder, ["aaa", "bbb"])
    with pytest.raises(TrainingStopped, match="aaa, bbb; .*here"):
        stage._next_state(state, bad, how, folder, ["aaa", "bbb"])


# P7 in the stage

def test_P7_the_stage_adapts_the_coefficient_only_with_a_target():
    figures, state = {"skipped_steps": 0, "epochs_run": 1, "kl": 12.0}, {"kl_coef": 0.1, "bad_rollouts": 0}
    how = {"minibatches": 2, "batch_size": 100, "kl_horizon": 1000, "rollouts": 30}
    fixed = stage._next_state(state, figures, types.SimpleNamespace(kl_target=None, **how), None, [])
    adapted = stage._next_state(state, figures, types.SimpleNamespace(kl_target=6.0, **how), None, [])
    lost = stage._next_state(state, figures | {"kl": math.nan}, types.SimpleNamespace(kl_target=6.0, **how), None, [])
    assert lost["kl_coef"] == 0.1  # one figure that is no number does not spoil all rollouts after it
    assert (fixed["kl_coef"], adapted["kl_coef"]) == (0.1, pytest.approx(0.1 * (1 + 0.2 * 0.1)))


# P9: PPO-ptx

PTX = [(p, ENCODER.completion_ids(t)) for p, t in zip(PROMPTS, ["cold", "Apples, pears and plums.", "twelve", "I do not know"], strict=False)]


def language_model_gradients(model):
    """Gradient of the mean of -log p over the completion tokens of PTX, from unpadded rows."""
    model.zero_grad(set_to_none=True)
    terms = []
    for prompt, completion in PTX:
        logits = model.policy(input_ids=torch.tensor([prompt + completion])).logits[0].float()
        terms += [-torch.log_softmax(logits[len(prompt) + t - 1], 0)[token] for t, token in enumerate(completion)]
    loss = sum(terms) / len(terms)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, loss.item()


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_P9_ptx_adds_gamma_times_the_language_model_gradient(kind):
    model = policy_and_value(ENCODER, kind)
    rollout = disturbed(rollout_of(model))
    without, _ = gradients(model, rollout)
    found, figures = gradients(model, rollout, ptx_rows=PTX, ptx_coef=2.5)
    language, loss = language_model_gradients(model)
    assert_same_gradients(found, {n: g + 2.5 * language.get(n, torch.zeros_like(g)) for n, g in without.items()})
    assert figures["ptx_loss"] == pytest.approx(loss, rel=1e-4)


def test_P9_ptx_rows_are_shared_out_over_the_steps(monkeypatch):
    rows = [([1], [place]) for place in range(10)]
    steps = [ptx for _, ptx in rows_of_steps(monkeypatch, 1, rows, epochs=2, minibatches=2)]
    assert len(steps) == 4 and sorted(sum(steps, [])) == rows and min(map(len, steps)) >= 2


def test_P9_steps_without_ptx_rows_do_not_count_in_the_mean_of_their_loss():
    """Two rows for four steps: the loss of the two steps that have one, at weights that stay as they are."""
    model = policy_and_value(ENCODER)
    rollout, still = rollout_of(model), types.SimpleNamespace(step=lambda: None, zero_grad=lambda: model.zero_grad(set_to_none=True))
    figures = update(cpu(), model, still, rollout, settings(epochs=2, ptx_coef=1.0), PAD, seed=0, ptx_rows=PTX[:2])
    losses = [-sum(naive_logprobs(model.policy, prompt, completion, 1.0)) / len(completion) for prompt, completion in PTX[:2]]
    assert figures["ptx_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


# P10: the moving average

def test_P10_average_follows_the_recursion():
    policy = nano(ENCODER)
    average = MovingAverage(policy, 0.9)
    expected = {n: p.double() for n, p in snapshot(policy).items()}
    for seed in range(4):
        rough(policy, seed, 0.1)
        average.step()
        expected = {n: 0.9 * expected[n] + 0.1 * p.detach().double() for n, p in policy.named_parameters()}
    average.copy_to_model()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_P10_average_moves_once_per_optimizer_step_and_is_kept_by_checkpoints():
    model = policy_and_value(ENCODER)
    average, calls = MovingAverage(model.policy, 0.5), []
    update(cpu(), model, ppo_optimizer(model, 1e-3, 1e-3), rollout_of(model), settings(epochs=3), PAD, seed=0,
           after_step=lambda: (calls.append(1), average.step()))
    assert len(calls) == 6
    other = MovingAverage(nano(ENCODER, 4), 0.5)
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(other.average[n], average.average[n]) for n in average.average)


def test_P10_with_lora_only_what_is_trained_is_averaged():
    model = policy_and_value(ENCODER, lora=True)
    assert all("lora" in name for name in MovingAverage(model.policy, 0.9).average)


# P11: early stop

@pytest.mark.parametrize(("target", "epochs"), [(None, 5), (1e9, 5), (1e-9, 1)])
def test_P11_epochs_stop_when_kl_to_the_old_policy_passes_its_limit(target, epochs):
    model = policy_and_value(ENCODER)
    figures = update(cpu(), model, ppo_optimizer(model, 1e-3, 1e-3), rollout_of(model), settings(epochs=5, target_kl=target), PAD, seed=0)
    assert figures["epochs_run"] == epochs


# P6: where the value model starts

def model_settings():
    return Config().model


@pytest.fixture
def folders(tmp_path):
    """An SFT model, and a reward model that normalises with gain 0.5 and bias -2."""
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    save_model(nano(ENCODER, 1), ENCODER, sft)
    model = rough(load_reward_model(str(sft), load_encoder(str(sft)), "eager"), 4)
    model.config.reward_gain, model.config.reward_bias = 0.5, -2.0
    save_model(model, ENCODER, reward)
    return sft, reward


@pytest.mark.parametrize(("kind", "with_reward"), [("separate", True), ("separate", False), ("shared", True)])
def test_P6_where_the_value_model_starts(folders, kind, with_reward):
    sft, reward = folders
    encoder = load_encoder(str(sft))
    policy = load_policy(str(sft), encoder, "eager")
    value_model = new_value_model(kind, policy, encoder, [reward] if with_reward else [], sft, "eager", model_settings())
    assert value_model.head.weight.eq(0).all() and value_model.head.bias.eq(0).all() and value_model.offset == 0
    assert (value_model.trunk is None) == (kind == "shared")
    if kind == "separate":
        source = load_reward_model(str(reward), encoder, "eager") if with_reward else policy
        hidden, started = (trunk(input_ids=torch.tensor(PROMPTS[:1])).last_hidden_state for trunk in (source.base_model, value_model.trunk))
        assert torch.equal(started, hidden)
        assert not set(map(id, value_model.parameters())) & set(map(id, policy.parameters()))


def test_values_are_not_rounded_to_bf16_by_their_head(folders):
    encoder = load_encoder(str(folders[0]))
    value_model = new_value_model("shared", load_policy(str(folders[0]), encoder, "eager"), encoder, [], folders[0], "eager", model_settings())
    with torch.no_grad():
        value_model.head.bias.fill_(2.705)  # bf16 has 2.703125 and 2.71875 next to it
    rows = make_rows([[1, 2]], [[3, 4]], 0, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        values_BC = value_model.of_hidden(torch.zeros(*rows.ids_BT.shape, value_model.head.in_features), rows)
    assert values_BC.tolist() == [pytest.approx([2.705, 2.705], abs=1e-5)]


def test_P6_the_first_rollout_puts_the_values_where_its_returns_are(folders, tmp_path):
    """Unlike the scores of a reward model, a function's are not about 0; later rollouts leave it at that."""
    for folder in folders:
        shutil.copytree(folder, tmp_path / "run" / folder.name / "model")
    config = load_config("configs/tiny.yaml", [
        f"run.dir={tmp_path / 'run'}", "run.precision=fp32", "data.max_completion_tokens=6", "ppo.score=tests.test_ppo:seven",
        "ppo.missing_eos_score=7", "ppo.likelihood_coef=0", "ppo.last_norm_lr=null", "ppo.lr=1e-9", "ppo.value_lr=1e-9"])
    encoder = load_encoder(str(folders[0]))
    learner = Learner(config, cpu(), encoder)
    rows = [Prompt([{"role": "user", "content": "Hi"}], ids, str(i), None) for i, ids in enumerate(PROMPTS[:4])]
    for step, expected in ((0, 0.0), (1, 7.0), (2, 7.0)):
        rollout = learner.roll(rows, 0.0, 1, step)
        assert rollout.values_BC[rollout.mask_BC].tolist() == pytest.approx([expected] * int(rollout.mask_BC.sum()), abs=1e-4)
        learner.learn(rollout, step)


def seven(prompts, completions):
    return [7.0] * len(completions)


# Which prompts a rollout gets

def test_the_text_of_a_rollout_has_all_turns_of_a_prompt_that_has_several():
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "What is red?"}]
    prompts = [Prompt(turns, [1, 2], "aa", None), Prompt(turns[-1:], [2], "bb", None)]
    rows = list(stage._as_text(prompts, ["A colour.", "No."], types.SimpleNamespace(scores_B=torch.tensor([0.5, -1.0])), None))
    assert rows == [{"prompt": "What is red?", "completion": "A colour.", "score": 0.5, "id": "aa", "before": turns[:2]},
                    {"prompt": "What is red?", "completion": "No.", "score": -1.0, "id": "bb"}]


def test_rollouts_take_every_prompt_once_per_pass_in_a_fresh_order():
    prompts = list(range(10))
    picked = [prompts_of_step(prompts, step, 4, seed=3) for step in range(5)]
    flat = sum(picked, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == prompts and flat[:10] != flat[10:]
    assert picked[2] == prompts_of_step(prompts, 2, 4, seed=3) != prompts_of_step(prompts, 2, 4, seed=4)


# Resume

def train(folder, first, last, lora, load=False):
    """Rollouts `first` to `last` of a run whose randomness follows from the step; returns the weights and the average."""
    accelerator = cpu()
    model, ref = policy_and_value(ENCODER, lora=lora), None if lora else nano(ENCODER)
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, 1e-3, 2e-3))
    average = MovingAverage(model.policy, 0.9)
    kept, place = {"average": average}, types.SimpleNamespace(checkpoints=folder, main=True)
    numbers = load_checkpoint(accelerator, place, kept) if load else {"step": 0}
    assert numbers["step"] == first
    for step in range(first, last):
        set_lr(optimizer, linear_lr(step, 4))
        rollout = collect(accelerator, model, ref, ENCODER, PROMPTS, share_of_even_ids, seed=step)
        figures = update(accelerator, model, optimizer, rollout, settings(epochs=2), PAD, seed=step, after_step=average.step)
        if step == first and load:
            assert figures["first_ratio_error"] < 1e-4
        save_checkpoint(accelerator, place, step + 1, 2, kept, kl_coef=0.125)
    return {**snapshot(model), **{f"average {n}": t for n, t in average.average.items()}}, numbers


@pytest.mark.parametrize("lora", [False, True])
def test_A1_P12_a_resumed_run_goes_on_bit_for_bit_and_a_half_written_checkpoint_is_not_taken(tmp_path, lora):
    straight, _ = train(tmp_path / "straight", 0, 4, lora)
    train(tmp_path / "cut", 0, 2, lora)
    (tmp_path / "cut" / "step_0000003.partial").mkdir()
    (tmp_path / "cut" / "step_0000003").mkdir()
    resumed, numbers = train(tmp_path / "cut", 2, 4, lora, load=True)
    assert numbers["kl_coef"] == 0.125
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


def test_checkpoints_are_pruned(tmp_path):
    place, accelerator = types.SimpleNamespace(checkpoints=tmp_path, main=True), cpu()
    for step in (1, 2, 10):
        save_checkpoint(accelerator, place, step, 2)
    assert [p.name for p in finished_checkpoints(place)] == ["step_0000002", "step_0000010"]


# Learning

def learn(kl_coef, rollouts=12):
    """PPO on a nano GPT whose score is the share of even ids: 1 is the optimum, chance is one half. Returns the last rollout's figures."""
    accelerator = cpu()
    model, ref = policy_and_value(ENCODER, "separate"), nano(ENCODER)
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, 2e-3, 2e-3))
    prompts = some_prompts(ENCODER, 64)
    for step in range(rollouts):
        rollout = collect(accelerator, model, ref, ENCODER, prompts, share_of_even_ids, seed=step, limit=2, kl_coef=kl_coef, budget=4000)
        if step + 1 < rollouts:
            update(accelerator, model, optimizer, rollout, settings(epochs=3, microbatch_tokens=4000, max_grad_norm=1.0), PAD, seed=step)
    return rollout.statistics(ENCODER)


def test_P3_learning_reaches_a_known_optimum():
    figures = learn(kl_coef=1e-4)
    assert figures["score_mean"] >= 0.9 and figures["kl"] > 3.0


def test_S3_a_high_price_of_kl_keeps_the_policy_near_its_reference():
    figures = learn(kl_coef=1.0)
    assert figures["score_mean"] < 0.7 and 0.0 < figures["kl"] < 1.5
