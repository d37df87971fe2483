"""Token rewards, GAE and whitening from their definitions: straight-line float64 loops, tables by hand, NaN on padding (CANON S3, P1, P2)."""

import math
import random

import pytest
import torch

from rlhf.advantages import gae, moments, token_rewards, whiten
from rlhf.masking import length_mask

F64 = torch.float64
NAN = math.nan


def ragged(rows, fill=NAN):
    """Lists of different lengths as [B, C] in float64 with `fill` on padding, and the mask."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=F64), length_mask([len(row) for row in rows])


def random_rows(seed, count=6, longest=9):
    rng = random.Random(seed)
    return [[rng.gauss(0, 1) for _ in range(length)] for length in [1, longest, *[rng.randint(1, longest) for _ in range(count - 2)]]]


def double_sum(rewards, values, gamma, lam):
    """GAE eq. 16 as it stands: sum over l of (gamma·lambda)^l times the temporal-difference error at t + l."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


# S3: token rewards

def test_S3_token_rewards_by_hand():
    logprobs, mask = ragged([[-1.0, -2.0, -0.5], [-3.0], [-1.0, -1.0]])
    ref, _ = ragged([[-1.5, -2.0, -1.5], [-1.0], [-1.25, -0.5]])
    rewards = token_rewards(torch.tensor([2.0, -1.0, 0.0], dtype=F64), logprobs, ref, mask, 0.1)
    expected = [[-0.05, 0.0, 2.0 - 0.1], [-1.0 + 0.2, 0.0, 0.0], [-0.025, 0.05, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=F64))


def test_S3_a_likelihood_coefficient_adds_the_references_log_probability_on_real_tokens():
    logprobs, mask = ragged([[-1.0, -2.0, -0.5], [-3.0]])
    ref, _ = ragged([[-1.5, -2.0, -1.5], [-1.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0], dtype=F64), logprobs, ref, mask, 0.1, 0.5)
    expected = [[-0.05 - 0.75, 0.0 - 1.0, 2.0 - 0.1 - 0.75], [-1.0 + 0.2 - 0.5, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_S3_score_lands_on_the_last_real_token_for_an_end_first_middle_and_missing(length):
    mask = length_mask([length], 5)
    zeros = torch.zeros(1, 5)
    rewards = token_rewards(torch.tensor([3.0]), zeros, zeros, mask, 0.5)
    assert rewards.tolist() == [[3.0 if t == length - 1 else 0.0 for t in range(5)]]


def test_S3_rewards_of_a_row_sum_to_score_minus_the_price_of_its_kl():
    logprobs, mask = ragged(random_rows(1))
    ref, _ = ragged([[x * 0.5 for x in row] for row in random_rows(1)])
    scores = torch.arange(len(mask), dtype=F64)
    rewards = token_rewards(scores, logprobs, ref, mask, 0.3)
    for b, row in enumerate(random_rows(1)):
        assert rewards[b].sum().item() == pytest.approx(b - 0.3 * sum(x * 0.5 for x in row))
    assert rewards[~mask].eq(0).all()


# P1: generalised advantage estimation

@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.5)])
def test_P1_gae_is_the_double_sum(gamma, lam):
    reward_rows = random_rows(2)
    value_rows = [[x * 2 + 0.3 for x in row[::-1]] for row in reward_rows]
    rewards, mask = ragged(reward_rows)
    values, _ = ragged(value_rows)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, (r, v) in enumerate(zip(reward_rows, value_rows, strict=True)):
        expected = double_sum(r, v, gamma, lam)
        assert advantages[b, : len(r)].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[b, : len(r)].tolist() == pytest.approx([a + x for a, x in zip(expected, v, strict=True)], abs=1e-12)
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_P1_gae_by_hand():
    rewards, mask = ragged([[0.0, 0.0, 1.0]])
    values, _ = ragged([[0.5, 0.5, 0.5]])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5]]
    assert returns.tolist() == [[0.625, 0.75, 1.0]]


def test_P1_defaults_are_gamma_1_lambda_095():
    rewards, mask = ragged([[0.0, 1.0]])
    assert gae(rewards, torch.zeros_like(rewards), mask)[0].tolist() == [[0.95, 1.0]]


def test_P1_lambda_and_gamma_1_give_the_reward_to_go():
    reward_rows = random_rows(3)
    rewards, mask = ragged(reward_rows)
    values, _ = ragged([[math.sin(x) for x in row] for row in reward_rows])
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    for b, row in enumerate(reward_rows):
        assert returns[b, : len(row)].tolist() == pytest.approx([sum(row[t:]) for t in range(len(row))], abs=1e-12)


def test_P1_what_stands_behind_a_completion_does_not_matter():
    rewards, mask = ragged([[0.1, -0.2, 1.0], [0.4]])
    values, _ = ragged([[0.3, 0.2, 0.1], [0.7]])
    wide = [torch.cat([t, torch.full((2, 4), 9.0, dtype=F64)], 1) for t in (rewards, values)]
    wide_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
    for narrow, padded in zip(gae(rewards, values, mask), gae(*wide, wide_mask), strict=True):
        torch.testing.assert_close(padded[:, :3], narrow)
        assert padded[:, 3:].eq(0).all()


# P2: whitening

def whitened(values, mask, shift_mean=True):
    return whiten(values, mask, moments(values, mask), shift_mean)


def test_P2_whitening_by_hand_with_biased_variance():
    values, mask = ragged([[1.0, 2.0], [3.0]])
    expected = math.sqrt(1.5)  # variance (1 + 0 + 1) / 3
    assert whitened(values, mask).tolist() == [[pytest.approx(-expected), pytest.approx(0.0, abs=1e-9)], [pytest.approx(expected), 0.0]]


def test_P2_whitened_values_have_mean_0_and_variance_1_and_nan_on_padding_is_ignored():
    values, mask = ragged([[x * 7 + 40 for x in row] for row in random_rows(4, 12)])
    out = whitened(values, mask)
    real = out[mask].tolist()
    mean = sum(real) / len(real)
    assert mean == pytest.approx(0.0, abs=1e-9)
    assert sum((x - mean) ** 2 for x in real) / len(real) == pytest.approx(1.0, abs=1e-6)
    assert out[~mask].eq(0).all()


def test_P2_whitening_keeps_the_mean_when_asked():
    rows = [[x * 3 + 5 for x in row] for row in random_rows(5, 12)]
    values, mask = ragged(rows)
    flat = [x for row in rows for x in row]
    real = whitened(values, mask, shift_mean=False)[mask].tolist()
    assert sum(real) / len(real) == pytest.approx(sum(flat) / len(flat), abs=1e-9)
    assert torch.tensor(real).var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)


def test_P2_whitening_does_not_feel_shift_and_scale():
    values, mask = ragged(random_rows(6, 10))
    torch.testing.assert_close(whitened(values * 12.5 - 3, mask), whitened(values, mask), rtol=0, atol=1e-6)


def test_P2_moments_of_processes_add_up_to_those_of_the_whole():
    values, mask = ragged(random_rows(7, 8))
    parts = moments(values[:3], mask[:3]) + moments(values[3:], mask[3:])
    torch.testing.assert_close(parts, moments(values, mask))
    torch.testing.assert_close(whiten(values[:3], mask[:3], parts), whitened(values, mask)[:3])
    assert moments(values, mask)[0].item() == sum(map(len, random_rows(7, 8)))


def test_P2_equal_values_whiten_to_0_and_not_to_nan():
    values = torch.full((2, 3), 0.1)
    assert whitened(values, torch.ones(2, 3, dtype=torch.bool)).abs().max().item() < 1e-3


def test_P2_small_spread_on_a_large_mean_keeps_its_digits():
    values = torch.tensor([[1000.0, 1000.5, 1001.0]])
    expected = torch.tensor([[-(1.5**0.5), 0.0, 1.5**0.5]])
    torch.testing.assert_close(whitened(values, torch.ones(1, 3, dtype=torch.bool)), expected, rtol=1e-4, atol=1e-4)
