"""Log-probabilities and entropies against softmax written out in float64 (CANON S1)."""

import math
import random

import pytest
import torch

from rlhf.logprobs import token_logprobs


def by_definition(logits, token, temperature):
    """(log-probability, entropy) in plain Python."""
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    total = sum(math.exp(x - top) for x in scaled)
    logs = [x - top - math.log(total) for x in scaled]
    return logs[token], -sum(math.exp(x) * x for x in logs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_S1_temperature_divides_the_logits(temperature):
    rng = random.Random(2)
    logits = [[rng.gauss(0, 3) for _ in range(11)] for _ in range(20)]
    ids = [rng.randrange(11) for _ in logits]
    logprobs, entropy = token_logprobs(torch.tensor(logits), torch.tensor(ids), temperature)
    expected = [by_definition(row, token, temperature) for row, token in zip(logits, ids, strict=True)]
    torch.testing.assert_close(logprobs, torch.tensor([e[0] for e in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.tensor([e[1] for e in expected]), rtol=1e-5, atol=1e-5)


def test_by_hand_on_three_tokens():
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), 1.0)
    assert logprobs.item() == pytest.approx(math.log(0.25))
    assert entropy.item() == pytest.approx(-(0.125 * math.log(0.125) + 0.25 * math.log(0.25) + 0.625 * math.log(0.625)))


def test_probabilities_sum_to_1_and_large_logits_stay_finite():
    logits = torch.tensor([[0.0, 3e4, -3e4, 2.0]]).expand(4, 4)
    logprobs, entropy = token_logprobs(logits, torch.arange(4), 1.0)
    assert logprobs.exp().sum().item() == pytest.approx(1.0)
    assert torch.isfinite(entropy).all() and torch.isfinite(logprobs).all()


def test_results_are_fp32_from_bf16_logits_and_the_entropy_has_no_gradient():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([1, 2, 3]), 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad


def test_gradient_is_indicator_minus_probability_over_temperature():
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([2]), 2.0)[0].sum().backward()
    p = torch.softmax(torch.tensor([0.15, -0.5, 1.0]), 0)
    torch.testing.assert_close(logits.grad[0], (torch.tensor([0.0, 0.0, 1.0]) - p) / 2.0)
