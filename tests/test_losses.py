"""The losses of stages 2 and 3 against the papers' equations in plain float64 Python, and truth tables by hand (CANON R3, R4, P3, P4)."""

import itertools
import math
import random

import pytest
import torch

from rlhf.losses import language_model_loss, policy_loss, ranking_loss, value_loss

F64 = torch.float64
NAN = math.nan


def one(value):
    return torch.tensor([[value]], dtype=F64)


REAL = torch.ones(1, 1, dtype=torch.bool)


# P3: the clipped policy loss. Columns: ratio, advantage, loss = max(-A·r, -A·clip(r, 0.8, 1.2)), derivative of the loss by log-probability

POLICY_TABLE = [
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # a good token already likelier: clipped, no further push
    (0.5, 2.0, -1.0, -1.0),  # a good token less likely: not clipped
    (0.5, -2.0, 1.6, 0.0),  # a bad token already less likely: clipped
    (1.5, -2.0, 3.0, 3.0),  # a bad token likelier: not clipped
    (0.9, -2.0, 1.8, 1.8),
    (3.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), POLICY_TABLE)
def test_P3_policy_loss_truth_table(ratio, advantage, loss, slope):
    logprobs = one(math.log(ratio) - 1.3).requires_grad_()
    total, count = policy_loss(logprobs, one(-1.3), one(advantage), REAL, 0.2)
    total.backward()
    assert (total.item(), count.item()) == (pytest.approx(loss), 1)
    assert logprobs.grad.item() == pytest.approx(slope)


# P3: the clipped value loss. Columns: value, old value, return, loss = 0.5·max((v-R)², (held-R)²), derivative by the value

VALUE_TABLE = [
    (1.0, 1.0, 1.0, 0.0, 0.0),
    (1.1, 1.0, 2.0, 0.405, -0.9),  # within the clip: the plain squared error
    (1.5, 1.0, 2.0, 0.32, 0.0),  # moved too far towards the return: held at 1.2, no further push
    (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away: the plain error is larger and pulls back
    (1.5, 1.0, 1.0, 0.125, 0.5),  # overshot: the plain error is larger
    (0.5, 1.0, 0.0, 0.32, 0.0),  # too far down towards the return: held at 0.8
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "slope"), VALUE_TABLE)
def test_P3_value_loss_truth_table(value, old, target, loss, slope):
    values = one(value).requires_grad_()
    total, count = value_loss(values, one(old), one(target), REAL, 0.2)
    total.backward()
    assert (total.item(), count.item()) == (pytest.approx(loss), 1)
    assert values.grad.item() == pytest.approx(slope)


def random_batch(seed, rows=5, columns=7):
    rng = random.Random(seed)
    lengths = [1, columns, *[rng.randint(1, columns) for _ in range(rows - 2)]]
    names = ("logprobs", "old", "advantages", "values", "old_values", "returns")
    table = {n: [[rng.gauss(0, 0.4) for _ in range(length)] for length in lengths] for n in names}
    tensors = {n: torch.tensor([row + [NAN] * (columns - len(row)) for row in table[n]], dtype=F64) for n in names}
    mask = torch.tensor([[t < length for t in range(columns)] for length in lengths])
    return table, tensors, mask


def test_P3_P4_losses_are_sums_over_real_tokens_as_the_equations_say():
    table, t, mask = random_batch(1)
    flat = {n: list(itertools.chain.from_iterable(rows)) for n, rows in table.items()}
    policy_expected = value_expected = 0.0
    for lp, old, a, v, v_old, r in zip(*flat.values(), strict=True):
        ratio = math.exp(lp - old)
        policy_expected -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)  # PPO eq. 7
        held = min(max(v, v_old - 0.3), v_old + 0.3)
        value_expected += 0.5 * max((v - r) ** 2, (held - r) ** 2)
    total, count = policy_loss(t["logprobs"], t["old"], t["advantages"], mask, 0.2)
    assert (total.item(), count.item()) == (pytest.approx(policy_expected), len(flat["old"]))
    total, count = value_loss(t["values"], t["old_values"], t["returns"], mask, 0.3)
    assert (total.item(), count.item()) == (pytest.approx(value_expected), len(flat["old"]))


def test_P4_sums_and_counts_of_parts_add_up_to_those_of_the_whole():
    _, t, mask = random_batch(2)
    for loss in (lambda s: policy_loss(t["logprobs"][s], t["old"][s], t["advantages"][s], mask[s], 0.2),
                 lambda s: value_loss(t["values"][s], t["old_values"][s], t["returns"][s], mask[s], 0.2),
                 lambda s: language_model_loss(t["logprobs"][s], mask[s])):
        whole, parts = loss(slice(None)), [loss(slice(0, 2)), loss(slice(2, None))]
        for i in range(2):
            assert sum(p[i] for p in parts).item() == pytest.approx(whole[i].item())


def test_P4_count_is_of_tokens_not_rows():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros = torch.zeros(2, 3)
    for _, count in (policy_loss(zeros, zeros, zeros, mask, 0.2), value_loss(zeros, zeros, zeros, mask, 0.2), language_model_loss(zeros, mask)):
        assert count.item() == 4


def test_language_model_loss_by_hand():
    total, count = language_model_loss(torch.tensor([[-1.0, -2.0], [-4.0, NAN]]), torch.tensor([[True, True], [True, False]]))
    assert (total.item(), count.item()) == (7.0, 3)


@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_A4_what_stands_on_padding_reaches_neither_loss_nor_gradient(poison):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = {n: torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("abcdef")}
    results = []
    for fill in (0.0, poison):
        t = {n: torch.where(mask, v, fill) for n, v in clean.items()}
        a, d = t["a"].clone().requires_grad_(), t["d"].clone().requires_grad_()
        total = policy_loss(a, t["b"], t["c"], mask, 0.2)[0] + value_loss(d, t["e"], t["f"], mask, 0.2)[0] + language_model_loss(a, mask)[0]
        total.backward()
        results.append((total.detach(), a.grad, d.grad))
    for zero, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, zero, rtol=0, atol=0)


# R3, R4: rankings

def pair_loss(better, worse, margin=0.0):
    return math.log(1 + math.exp(-(better - worse - margin)))


def by_definition(rewards, ranks, ties="drop", margin=0.0):
    """Mean over a prompt's pairs of -log sigmoid, in plain Python; None without a pair."""
    losses = []
    for i, j in itertools.combinations([k for k, rank in enumerate(ranks) if rank > 0], 2):
        if ranks[i] != ranks[j]:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            losses.append(pair_loss(rewards[better], rewards[worse], margin))
        elif ties == "half":
            losses.append(0.5 * pair_loss(rewards[i], rewards[j]) + 0.5 * pair_loss(rewards[j], rewards[i]))
    return sum(losses) / len(losses) if losses else None


def rank_loss(rewards, ranks, **how):
    total, count = ranking_loss(torch.tensor(rewards, dtype=F64), torch.tensor(ranks), **how)
    return total.item(), count.item()


def test_R3_pair_loss_is_minus_log_sigmoid_of_chosen_minus_rejected():
    assert rank_loss([[2.0, 0.5]], [[1, 2]]) == (pytest.approx(-math.log(1 / (1 + math.exp(-1.5)))), 1)
    assert rank_loss([[2.0, 0.5]], [[2, 1]]) == (pytest.approx(-math.log(1 / (1 + math.exp(1.5)))), 1)


def test_R3_margin_is_subtracted_from_the_difference():
    margins = torch.tensor([0.7, 0.0], dtype=F64)
    total, count = rank_loss([[2.0, 0.5], [1.0, 3.0]], [[1, 2], [1, 2]], margin_B=margins)
    assert (total, count) == (pytest.approx(math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(2.0))), 2)


@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_R3_ties_are_dropped(margin):
    rewards, ranks = [1.0, 0.2, -0.5], [1, 2, 2]
    margins = torch.tensor([margin], dtype=F64)
    assert rank_loss([rewards], [ranks], margin_B=margins)[0] == pytest.approx((pair_loss(1.0, 0.2, margin) + pair_loss(1.0, -0.5, margin)) / 2)
    assert rank_loss([[1.0, 0.2]], [[1, 1]]) == (0.0, 0)


def test_R3_ties_with_label_one_half():
    tied = 0.5 * (pair_loss(0.2, -0.5) + pair_loss(-0.5, 0.2))
    assert rank_loss([[1.0, 0.2, -0.5]], [[1, 2, 2]], ties="half")[0] == pytest.approx((pair_loss(1.0, 0.2) + pair_loss(1.0, -0.5) + tied) / 3)
    assert rank_loss([[3.0, 3.0]], [[1, 1]], ties="half") == (pytest.approx(math.log(2)), 1)


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_R4_k_way_loss_is_the_mean_of_pair_losses(k, ties):
    rng = random.Random(k)
    rewards = [[rng.gauss(0, 2) for _ in range(k)] for _ in range(6)]
    ranks = [[rng.randint(1, k) for _ in range(k)] for _ in range(5)] + [[1] * k]  # the last: all tied
    expected = [x for x in map(by_definition, rewards, ranks, [ties] * 6) if x is not None]
    assert rank_loss(rewards, ranks, ties=ties) == (pytest.approx(sum(expected)), len(expected))


def test_R4_all_pairs_of_a_strict_ranking_are_divided_by_k_choose_2():
    rewards = [0.0, 0.0, 0.0, 0.0]  # every pair costs log 2, and so does their mean over the six
    assert rank_loss([rewards], [[3, 1, 4, 2]]) == (pytest.approx(math.log(2)), 1)


def test_R4_loss_does_not_feel_the_order_in_which_the_answers_are_given():
    rewards, ranks = [0.3, -1.2, 2.2, 0.9], [2, 4, 1, 2]
    first = rank_loss([rewards], [ranks], ties="half")
    for order in itertools.permutations(range(4)):
        assert rank_loss([[rewards[i] for i in order]], [[ranks[i] for i in order]], ties="half") == (pytest.approx(first[0]), 1)


def test_R4_every_prompt_weighs_the_same_whatever_its_k():
    """Gradients by reward: a prompt of 2 and a prompt of 4 at equal rewards pull with the same total strength on their best and worst."""
    rewards = torch.zeros(2, 4, dtype=F64, requires_grad=True)
    total, count = ranking_loss(rewards, torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4]]))
    total.backward()
    assert (total.item(), count.item()) == (pytest.approx(2 * math.log(2)), 2)
    torch.testing.assert_close(rewards.grad, torch.tensor([[-0.5, 0.5, 0, 0], [-0.25, -0.25 / 3, 0.25 / 3, 0.25]], dtype=F64))


def test_R4_A4_empty_places_reach_neither_loss_nor_gradient():
    ranks = torch.tensor([[2, 1, 0], [1, 3, 2]])
    results = []
    for fill in (0.0, NAN):
        rewards = torch.tensor([[0.5, 1.0, fill], [0.1, -0.4, 0.8]], dtype=F64, requires_grad=True)
        total, count = ranking_loss(rewards, ranks, ties="half")
        total.backward()
        results.append((total.detach(), count, rewards.grad))
    for zero, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, zero, rtol=0, atol=0)


def test_R3_large_differences_stay_finite():
    assert rank_loss([[1e4, -1e4]], [[2, 1]]) == (pytest.approx(2e4), 1)
    assert rank_loss([[1e4, -1e4]], [[1, 2]]) == (pytest.approx(0.0), 1)
