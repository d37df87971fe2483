"""KL estimators against the exact divergence over a small vocabulary, and the coefficient's controller by hand (CANON P7, P8)."""

import math
import random

import pytest
import torch

from rlhf.kl import adapted_kl_coef, k1, k3


def distribution(rng, size):
    weights = [rng.uniform(0.05, 1.0) for _ in range(size)]
    return [w / sum(weights) for w in weights]


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def expectation(estimator, p, q):
    """The estimator's mean over all tokens, each with its probability under p."""
    log_p, log_q = (torch.tensor([math.log(x) for x in d], dtype=torch.float64) for d in (p, q))
    return (torch.tensor(p, dtype=torch.float64) * estimator(log_p, log_q)).sum().item()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_P8_estimators_are_unbiased_by_enumeration(estimator):
    rng = random.Random(1)
    for _ in range(20):
        p, q = distribution(rng, 5), distribution(rng, 5)
        assert expectation(estimator, p, q) == pytest.approx(exact_kl(p, q), abs=1e-12)


def test_P8_estimators_by_hand():
    log_p, log_q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    torch.testing.assert_close(k1(log_p, log_q), torch.tensor([math.log(2), 0.0, -math.log(2)]))
    torch.testing.assert_close(k3(log_p, log_q), torch.tensor([0.5 - 1 + math.log(2), 0.0, 2 - 1 - math.log(2)]))


def test_P8_k3_is_never_negative_and_both_are_0_between_equals():
    logs = torch.linspace(-12, 0, 97)
    assert (k3(logs[:, None], logs[None, :]) >= 0).all()
    assert k1(logs, logs).eq(0).all() and k3(logs, logs).eq(0).all()


def test_P8_k3_keeps_its_digits_near_0():
    """r - 1 - log r is about d²/2: a plain exp(d) - 1 - d in fp32 would be all rounding at d = 1e-4."""
    p = torch.zeros(1)
    assert k3(p, torch.tensor([1e-4])).item() == pytest.approx(0.5e-8, rel=0.2)


@pytest.mark.parametrize(("kl", "expected"), [
    (6.0, 0.05),  # on target
    (6.6, 0.05 * (1 + 0.1 * 256 / 10_000)),  # 10 % above
    (3.0, 0.05 * (1 - 0.2 * 256 / 10_000)),  # 50 % below, held at 20 %
    (60.0, 0.05 * (1 + 0.2 * 256 / 10_000)),  # ten times, held at 20 %
    (-1.0, 0.05 * (1 - 0.2 * 256 / 10_000)),  # k1 can be negative
])
def test_P7_adaptive_coefficient_by_hand(kl, expected):
    assert adapted_kl_coef(0.05, kl, 6.0, 256, 10_000) == pytest.approx(expected, rel=1e-12)


def test_P7_controller_brings_kl_to_its_target():
    """A plant whose KL falls as the price rises: KL = 0.3 / coefficient."""
    coefficient = 0.2
    for _ in range(2000):
        coefficient = adapted_kl_coef(coefficient, 0.3 / coefficient, 6.0, 256, 10_000)
    assert 0.3 / coefficient == pytest.approx(6.0, rel=1e-3)
