"""The small GPT is what it says it is (CANON B1)."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rlhf.models import add_lora, new_gpt, save_model
from tests.helpers import nano, tiny_encoder

ENCODER = tiny_encoder()


def by_hand(weights: dict, ids: list[int], layers: int, heads: int) -> torch.Tensor:
    """Logits [T, V] of a GPT-2 with exact GELU, from its equations."""
    def norm(x, name):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    width = x.shape[1] // heads
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        queries, keys, values = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(x.shape[1], 1)
        attended = torch.zeros_like(x)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            for t in range(len(ids)):
                share = torch.softmax(keys[: t + 1, own] @ queries[t, own] / math.sqrt(width), 0)
                attended[t, own] = share @ values[: t + 1, own]
        x = x + linear(attended, f"{block}.attn.c_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def test_B1_logits_are_those_of_the_equations():
    model, ids = nano(ENCODER), [5, 40, 41, 7, 200]
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor([ids])).logits[0]
        expected = by_hand({name: w.double() for name, w in model.state_dict().items()}, ids, layers=2, heads=2)
    assert F.softmax(found, -1).max() > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_B1_a_fresh_gpt_starts_at_gpt_2s_scales():
    torch.manual_seed(0)
    model = new_gpt("micro", ENCODER, 256, "eager")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wpe.weight.shape == (256, 192)
    assert len(model.transformer.h) == 4
    for block in model.transformer.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.03)
        for other in (block.attn.c_attn, block.mlp.c_fc):
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("rank", [0, 2])
def test_whoever_generates_from_a_saved_policy_reads_each_token_once(rank, tmp_path):
    """The Trainer of `transformers` leaves the past switched off, and models made from such a configuration start without it."""
    model = nano(ENCODER)
    model.config.use_cache = model.generation_config.use_cache = False
    save_model(add_lora(model, rank, 4, "CAUSAL_LM"), ENCODER, tmp_path)
    policy, read = AutoModelForCausalLM.from_pretrained(tmp_path), []
    policy.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    policy.generate(input_ids=torch.tensor([[5, 40, 41]]), attention_mask=torch.ones(1, 3), max_new_tokens=4, min_new_tokens=4)
    assert read == [3, 1, 1, 1]
