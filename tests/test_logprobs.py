"""Log-probabilities and entropies against softmax written out in float64 (CANON S1)."""

import math
import random

import pytest
import torch

import rlhf.logprobs
from rlhf.logprobs import linear_cross_entropy, output_logprobs, token_logprobs


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


# The fused output layer

def layer(tokens=7, width=5, vocabulary=11, dtype=torch.float64):
    """(hidden, weight, ids, an upstream gradient), the same every time."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((tokens, width), (vocabulary, width), (tokens,)))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocabulary, (tokens,), generator=generator), upstream


@pytest.fixture(params=[1, 4, 7, 100])
def chunk(request, monkeypatch):
    """Tokens to a chunk."""
    monkeypatch.setattr(rlhf.logprobs, "CHUNK", 0)
    monkeypatch.setattr(rlhf.logprobs, "CHUNK_TOKENS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_S1_output_logprobs_are_those_of_the_logits_with_the_same_gradients(chunk, temperature):
    hidden, weight, ids, upstream = layer()
    logits = hidden @ weight.T / temperature
    plain = torch.log_softmax(logits, 1)[range(7), ids]
    logprobs, entropy = output_logprobs(hidden, weight, ids, temperature)
    torch.testing.assert_close(logprobs, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    ours, expected = (torch.autograd.grad((of * upstream).sum(), (hidden, weight)) for of in (logprobs, plain))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_frozen_output_layer_gets_no_gradient():
    hidden, weight, ids, _ = layer()
    output_logprobs(hidden, weight.detach(), ids, 1.0)[0].sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_linear_cross_entropy_is_the_output_layer_and_cross_entropy(chunk):
    hidden, weight, ids, _ = layer()
    plain, ours = torch.nn.functional.cross_entropy(hidden @ weight.T, ids, reduction="sum"), linear_cross_entropy(hidden, weight, ids)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(3.0 * of, (hidden, weight)) for of in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [linear_cross_entropy, lambda *args: -output_logprobs(*args, 1.0)[0].sum()])
def test_under_autocast_products_are_in_bf16_and_results_in_fp32(loss):
    hidden, weight, ids, _ = layer(64, 32, 50, torch.float32)
    exact = loss(hidden, weight, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(hidden, weight, ids)
    assert rounded.dtype == torch.float32 and rounded.item() != exact.item() and rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    for a, b in zip(*(torch.autograd.grad(of, (hidden, weight)) for of in (rounded, exact)), strict=True):
        assert a.dtype == torch.float32 and 0 < float((a - b).norm() / b.norm()) < 1e-2
