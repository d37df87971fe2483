"""Rollouts: hand-made rows through rewards, GAE and whitening; statistics by hand; the reference (CANON S1, S3, P1, P2, P8, P12, A2)."""

import math
import types

import pytest
import torch

from rlhf.compute import my_share
from rlhf.errors import InputError
from rlhf.models import add_lora
from rlhf.passes import make_rows, policy_pass
from rlhf.rollout import Clock, Rollout, evaluate_tokens, make_rollout, reference, shift_to_returns
from tests.helpers import collect, cpu, naive_logprobs, nano, policy_and_value, snapshot, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 7)
EOS = ENCODER.eos_id


def tokens_of(*rows):
    """(logprobs, ref_logprobs, entropy, values) of a completion as make_rollout wants them."""
    return tuple(torch.tensor(row) for row in rows)


HAND = {
    "prompts": [[5, 6], [7]],
    "completions": [[8, EOS], [9, 9, 9]],
    "scores_B": torch.tensor([1.0, -1.0]),
    "tokens": [tokens_of([-1.0, -2.0], [-1.5, -1.5], [0.5, 0.25], [0.2, 0.4]),
               tokens_of([-0.5, -0.5, -1.0], [-0.5, -1.5, -1.0], [1.0, 0.75, 0.5], [0.0, -0.3, -0.6])],
}


def hand_rollout(kl_coef=0.1, gamma=1.0, lam=0.5, whiten_rewards=False, likelihood_coef=0.0):
    return make_rollout(cpu(), **HAND, kl_coef=kl_coef, gamma=gamma, lam=lam, whiten_rewards=whiten_rewards, likelihood_coef=likelihood_coef)


def near(expected, rel=1e-5):
    return [[pytest.approx(x, rel=rel, abs=1e-6) for x in row] for row in expected]


def test_S3_P1_P2_a_rollout_by_hand():
    rollout = hand_rollout()
    assert rollout.mask_BC.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.rewards_BC.tolist() == near([[-0.05, 0.05 + 1.0, 0.0], [0.0, -0.1, -1.0]])
    # row 0: deltas -0.05 + 0.4 - 0.2 = 0.15 and 1.05 - 0.4 = 0.65; row 1: -0.3, -0.1 - 0.6 + 0.3 = -0.4, -1 + 0.6 = -0.4
    raw = [[0.15 + 0.5 * 0.65, 0.65], [-0.3 + 0.5 * (-0.4 + 0.5 * -0.4), -0.4 + 0.5 * -0.4, -0.4]]
    assert rollout.returns_BC.tolist() == near([[raw[0][0] + 0.2, raw[0][1] + 0.4, 0.0], [raw[1][0], raw[1][1] - 0.3, raw[1][2] - 0.6]])
    white = whitened(raw[0] + raw[1])
    assert rollout.advantages_BC.tolist() == near([[*white[:2], 0.0], white[2:]])


def test_P6_values_shift_by_what_they_lack_of_the_rewards_that_followed_by_hand():
    rollout, offset = shift_to_returns(hand_rollout(), gamma=1.0, lam=0.5)
    lacks = [1.0 - 0.2, 1.05 - 0.4, -1.1 - 0.0, -1.1 + 0.3, -1.0 + 0.6]  # rewards to the end, less values; no value stands in for a reward
    assert offset == pytest.approx(sum(lacks) / 5) == pytest.approx(-0.17)
    assert rollout.values_BC.tolist() == near([[0.03, 0.23, 0.0], [-0.17, -0.47, -0.77]])
    # row 0: deltas -0.05 + 0.23 - 0.03 = 0.15 and 1.05 - 0.23 = 0.82; row 1: -0.47 + 0.17 = -0.3, -0.1 - 0.77 + 0.47 = -0.4, -1 + 0.77 = -0.23
    raw = [[0.15 + 0.5 * 0.82, 0.82], [-0.3 + 0.5 * (-0.4 + 0.5 * -0.23), -0.4 + 0.5 * -0.23, -0.23]]
    assert rollout.returns_BC.tolist() == near([[raw[0][0] + 0.03, raw[0][1] + 0.23, 0.0], [raw[1][0] - 0.17, raw[1][1] - 0.47, raw[1][2] - 0.77]])
    white = whitened(raw[0] + raw[1])
    assert rollout.advantages_BC.tolist() == near([[*white[:2], 0.0], white[2:]])


def whitened(numbers):
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    return [(x - mean) / deviation for x in numbers]


def test_P2_rewards_are_whitened_only_when_asked_and_keep_their_mean():
    plain, white = hand_rollout().rewards_BC, hand_rollout(whiten_rewards=True).rewards_BC
    flat, real = [-0.05, 1.05, 0.0, -0.1, -1.0], white[hand_rollout().mask_BC].tolist()
    assert plain[hand_rollout().mask_BC].tolist() == pytest.approx(flat, abs=1e-6)
    assert real == pytest.approx([x + sum(flat) / 5 for x in whitened(flat)], abs=1e-5)


def test_S3_a_rollout_rewards_likelihood_when_asked():
    assert hand_rollout(likelihood_coef=0.2).rewards_BC.tolist() == near([[-0.05 - 0.3, 1.05 - 0.3, 0.0], [-0.1, -0.1 - 0.3, -1.0 - 0.2]])


def test_a_rollouts_figures_by_hand():
    figures = hand_rollout().statistics(ENCODER)
    assert figures["kl"] == pytest.approx((0.5 - 0.5 + 0.0 + 1.0 + 0.0) / 2)
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5, 0.0, math.exp(-1.0) - 1 + 1.0, 0.0]
    assert figures["kl_k3"] == pytest.approx(sum(k3) / 2)
    assert figures["entropy"] == pytest.approx((0.5 + 0.25 + 1.0 + 0.75 + 0.5) / 5)
    assert (figures["score_mean"], figures["score_std"]) == (0.0, 1.0)
    assert (figures["length_mean"], figures["eos_rate"]) == (2.5, 0.5)
    assert figures["likelihood"] == pytest.approx((-1.5 - 1.5 - 0.5 - 1.5 - 1.0) / 2)
    values, returns = [0.2, 0.4, 0.0, -0.3, -0.6], [0.675, 1.05, -0.6, -0.9, -1.0]
    errors = [r - v for r, v in zip(returns, values, strict=True)]

    def variance(x):
        return sum((y - sum(x) / len(x)) ** 2 for y in x) / len(x)

    assert figures["return_mean"] == pytest.approx(sum(returns) / 5, abs=1e-6)
    assert figures["explained_variance"] == pytest.approx(1 - variance(errors) / variance(returns), rel=1e-4)


def test_a_rollout_checks_its_own_shapes():
    good = hand_rollout()
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    Rollout(**fields)
    for name in ("values_BC", "scores_B", "mask_BC"):
        with pytest.raises(ValueError, match=name):
            Rollout(**{**fields, name: fields[name][:1]})


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_S1_tokens_are_evaluated_at_the_sampling_temperature_in_the_order_given(kind, budget):
    model, ref = policy_and_value(ENCODER, kind).eval(), nano(ENCODER, 9).eval()
    pairs = [(p, [30 + i, 40, EOS][: 1 + i % 3]) for i, p in enumerate(PROMPTS)]
    results = evaluate_tokens(model, reference(ref, model.policy, 0.7, cpu().autocast), pairs, ENCODER.pad_id, 0.7, budget, "cpu")
    for (prompt, completion), (logprobs, ref_logprobs, entropy, values) in zip(pairs, results, strict=True):
        assert logprobs.tolist() == pytest.approx(naive_logprobs(model.policy, prompt, completion, 0.7), abs=2e-5)
        assert ref_logprobs.tolist() == pytest.approx(naive_logprobs(ref, prompt, completion, 0.7), abs=2e-5)
        assert len(entropy) == len(values) == len(completion) and not logprobs.requires_grad


def test_A2_P8_kl_to_the_reference_is_exactly_0_before_anything_is_learned():
    accelerator = cpu()
    model = policy_and_value(ENCODER)
    rollout = collect(accelerator, model, nano(ENCODER), ENCODER, PROMPTS, len)
    assert rollout.statistics(ENCODER)["kl"] == rollout.statistics(ENCODER)["kl_k3"] == 0.0
    lora = policy_and_value(ENCODER, lora=True)
    rollout = collect(accelerator, lora, None, ENCODER, PROMPTS, len)
    assert rollout.statistics(ENCODER)["kl"] == 0.0


def test_P12_with_lora_the_reference_is_the_policy_with_its_adapters_off():
    base = nano(ENCODER)
    torch.manual_seed(1)
    policy = add_lora(nano(ENCODER), 4, 8, "CAUSAL_LM")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
    rows = make_rows(PROMPTS, [[40, 41, EOS]] * len(PROMPTS), ENCODER.pad_id, "cpu")
    before = snapshot(policy)
    found = reference(None, policy, 1.0, cpu().autocast)(rows)
    with torch.no_grad():
        expected, trained = policy_pass(base, rows, 1.0)[0], policy_pass(policy, rows, 1.0)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (trained - expected).abs().max() > 0.1  # afterwards the adapters are on again
    assert not found.requires_grad and all(torch.equal(p, before[n]) for n, p in policy.named_parameters())


def test_clock_adds_up_by_phase():
    clock = Clock()
    for _ in range(2):
        with clock("sample"):
            sum(range(10_000))
    with clock("update"):
        pass
    taken = clock.take()
    assert set(taken) == {"seconds_sample", "seconds_update"} and taken["seconds_sample"] > 0 and clock.take() == {}


def test_rows_are_shared_out_in_order_and_too_few_are_refused_on_every_process():
    def among(count, rows):
        return [my_share(types.SimpleNamespace(num_processes=count, process_index=i), rows) for i in range(count)]

    assert among(3, [1, 2, 3, 4]) == [[1], [2], [3, 4]]
    for index in range(3):
        with pytest.raises(InputError, match="2 rows of a batch cannot be shared among 3 processes; start fewer"):
            my_share(types.SimpleNamespace(num_processes=3, process_index=index), [1, 2])


def test_what_processes_send_each_other_is_a_rows_own_numbers():
    """A view would be pickled with the whole microbatch that it is a view of."""
    model = policy_and_value(ENCODER)
    pairs = [(PROMPTS[0], [7] * length) for length in (2, 5, 9)]
    with torch.no_grad():
        rows = evaluate_tokens(model, lambda batch: torch.zeros(batch.mask_BC.shape), pairs, ENCODER.pad_id, 1.0, 1000, "cpu")
    assert [[t.untyped_storage().nbytes() for t in row] for row in rows] == [[4 * length] * 4 for length in (2, 5, 9)]
