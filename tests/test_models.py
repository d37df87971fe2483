"""The small GPT is what it says it is (CANON B1)."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForSequenceClassification

from rlhf.models import (
    add_lora,
    fp32_head,
    hold_for_products,
    load_policy,
    load_reward_model,
    new_gpt,
    parameters_in_words,
    save_model,
    share_equal,
    untrained_policy,
)
from tests.helpers import llama, nano, rough, tiny_encoder

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


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_how_many_parameters_there_are_and_how_many_are_trained_is_said(task, tmp_path):
    save_model(new_gpt("micro", ENCODER, 256, "eager"), ENCODER, tmp_path)
    model = (load_policy if task == "CAUSAL_LM" else load_reward_model)(str(tmp_path), ENCODER, "eager")
    block = 12 * 192**2 + 13 * 192
    count = 300 * 192 + 256 * 192 + 4 * block + 2 * 192 + (192 if task == "SEQ_CLS" else 0)
    assert parameters_in_words(model) == f"{count / 1e6:.1f}M parameters"
    adapters = 4 * 8 * (192 + 576 + 192 + 192 + 192 + 768 + 768 + 192) + (192 if task == "SEQ_CLS" else 0)  # rank 8 at four products a block
    said = parameters_in_words(add_lora(model, 8, 16, task))
    assert said == f"{(count + adapters) / 1e6:.1f}M parameters, {adapters / 1e6:.1f}M of them trained"


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


# Frozen weights held for products

def classifier(encoder):
    torch.manual_seed(2)
    model = LlamaForSequenceClassification(LlamaConfig(**{**llama(encoder).config.to_dict(), "num_labels": 1}))
    model.config.pad_token_id = encoder.pad_id
    fp32_head(model)
    return rough(model, 5)


FROZEN = {
    "gpt2, tied": lambda: nano(ENCODER).requires_grad_(False),
    "llama, not tied": lambda: llama(ENCODER).requires_grad_(False),
    "reward model": lambda: classifier(ENCODER).requires_grad_(False),
    "lora": lambda: rough(add_lora(nano(ENCODER), 2, 4, "CAUSAL_LM"), 3, 0.05),
}


@pytest.mark.parametrize("name", FROZEN)
@torch.no_grad()
def test_what_is_held_for_products_gives_the_same_numbers_to_the_bit(name):
    model, ids = FROZEN[name]().eval(), torch.tensor([[5, 40, 41, 7, 200, 9]])
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits
        hold_for_products(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(p, trained[n]) and p.dtype == torch.float32 for n, p in model.named_parameters() if p.requires_grad)
    products = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad and n.endswith("weight") and p.ndim == 2}
    rounded = {n for n, dtype in products.items() if dtype == torch.bfloat16}
    assert rounded == {n for n in products if "wte" not in n and "wpe" not in n and "embed" not in n and "score" not in n} and len(rounded) > 4
    assert bool(trained) == (name == "lora")


def test_nothing_is_held_for_products_without_autocast_nor_what_is_trained():
    model = nano(ENCODER).requires_grad_(False)
    hold_for_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        hold_for_products(trained := nano(ENCODER))
    assert {p.dtype for m in (model, trained) for p in m.parameters()} == {torch.float32}
    assert trained.lm_head.weight is trained.transformer.wte.weight


def test_equal_frozen_weights_are_shared_and_no_others():
    mine, theirs = add_lora(nano(ENCODER), 2, 4, "CAUSAL_LM").get_base_model(), nano(ENCODER).requires_grad_(False)
    with torch.no_grad():
        mine.transformer.h[0].ln_1.bias.add_(1)
    mine.transformer.h[1].ln_2.bias.data = mine.transformer.h[1].ln_2.bias.double()
    share_equal(mine, theirs)
    of_theirs = {p.data_ptr() for p in theirs.parameters()}
    own = {n for n, p in mine.named_parameters() if p.data_ptr() not in of_theirs}
    assert own == {"transformer.h.0.ln_1.bias", "transformer.h.1.ln_2.bias"} | {n for n, p in mine.named_parameters() if "lora_" in n}


def test_a_causal_model_without_a_fused_kernel_gets_plain_products(tmp_path):
    """Gemma 2 caps its attention, which the kernel that GPUs are asked for cannot."""
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                           num_key_value_heads=1, head_dim=8, attn_implementation="eager"))
    save_model(gemma, ENCODER, tmp_path)
    loaded, ids = load_policy(str(tmp_path), ENCODER, "sdpa"), torch.tensor([[5, 40, 41, 7, 200]])
    for model in (loaded, untrained_policy(str(tmp_path), ENCODER, "sdpa", seed=1), load_reward_model(str(tmp_path), ENCODER, "sdpa")):
        assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, gemma.eval()(input_ids=ids).logits)
