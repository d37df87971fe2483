"""The sampler against a naive one that recomputes everything, one row at a time, without cache or padding (CANON B2, S1, S2)."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

import rlhf.sampling
from rlhf.errors import InputError
from rlhf.models import adapted_layers, adapters_merged, add_lora, hold_for_products
from rlhf.passes import PassCost
from rlhf.sampling import _draw, check_backbone, draw_uniforms, sample
from rlhf.workers import Workers
from tests.helpers import CONTEXT, llama, nano, rough, snapshot, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 12)


def naive_sample(policy, prompt, uniforms, temperature):
    """Full forward for every token; the inverse of the cumulative distribution in float64 Python."""
    ids = list(prompt)
    for u in uniforms:
        with torch.no_grad():
            logits = (policy(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).tolist()
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        threshold, total, token = u * sum(weights), 0.0, 0
        for token, weight in enumerate(weights):  # noqa: B007 - the token is the result
            total += weight
            if total > threshold:
                break
        ids.append(token)
        if token == ENCODER.eos_id:
            break
    return ids[len(prompt):]


def likely_to_end(policy, by=4.0):
    """EOS gets a share of the probability, so that rows of a batch end at different places."""
    with torch.no_grad():
        policy.base_model.wte.weight[ENCODER.eos_id] *= by
    return policy


POLICIES = {
    "gpt2": lambda: nano(ENCODER),
    "gpt2, fused attention": lambda: nano(ENCODER, attention="sdpa"),
    "gpt2 that ends": lambda: likely_to_end(nano(ENCODER)),
    "llama": lambda: llama(ENCODER),
    "lora": lambda: add_lora(nano(ENCODER), 4, 8, "CAUSAL_LM"),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_B2_S1_tokens_are_those_of_a_naive_sampler(name, temperature):
    policy = POLICIES[name]().eval()
    uniforms = draw_uniforms(len(PROMPTS), 10, 3)
    expected = [naive_sample(policy, p, u, temperature) for p, u in zip(PROMPTS, uniforms.tolist(), strict=True)]
    assert sample(policy, PROMPTS, uniforms, ENCODER, temperature, len(PROMPTS)) == expected


@pytest.mark.parametrize("name", POLICIES)
def test_B2_prompts_that_are_read_apart_are_answered_as_by_a_naive_sampler(name, monkeypatch):
    """Cut wherever a group gets narrower; some prompts come twice."""
    monkeypatch.setattr(rlhf.sampling, "pass_cost", lambda model: PassCost(tokens=0, rows=1))
    policy, read, prompts = POLICIES[name]().eval(), [], [PROMPTS[1] + [40] * extra for extra in (17, 0, 33, 9, 0, 33, 25)]
    whole = rlhf.sampling.tight_groups
    monkeypatch.setattr(rlhf.sampling, "tight_groups", lambda *args, **more: (read.extend(groups := whole(*args, **more)), groups)[1])
    uniforms = draw_uniforms(len(prompts), 10, 3)
    expected = [naive_sample(policy, p, u, 1.0) for p, u in zip(prompts, uniforms.tolist(), strict=True)]
    assert sample(policy, prompts, uniforms, ENCODER, 1.0, len(prompts)) == expected
    assert len(read) > 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_B2_completions_do_not_depend_on_who_else_is_in_the_batch(batch_size, attention):
    """A batch of one has no padding at all: kernels then take other roads than with a mask."""
    policy = likely_to_end(nano(ENCODER, attention=attention)).eval()
    uniforms = draw_uniforms(len(PROMPTS), 12, 5)
    together = sample(policy, PROMPTS, uniforms, ENCODER, 1.0, len(PROMPTS))
    assert sample(policy, PROMPTS, uniforms, ENCODER, 1.0, batch_size) == together
    assert sample(policy, PROMPTS[::-1], uniforms.flip(0), ENCODER, 1.0, batch_size) == together[::-1]
    assert len({len(c) for c in together}) > 3  # the rows did end at different places


@pytest.mark.parametrize("name", ["gpt2 that ends", "llama"])
def test_workers_sample_what_one_thread_samples(name):
    policy, uniforms = POLICIES[name]().eval(), draw_uniforms(len(PROMPTS), 12, 5)
    alone = sample(policy, PROMPTS, uniforms, ENCODER, 1.0, 5)
    for _ in range(3):
        assert sample(policy, PROMPTS, uniforms, ENCODER, 1.0, 5, Workers(2)) == alone


def test_S2_completions_stop_at_their_first_eos_or_at_the_limit():
    policy = likely_to_end(nano(ENCODER)).eval()
    completions = sample(policy, PROMPTS * 4, draw_uniforms(48, 9, 7), ENCODER, 1.0, 48)
    assert all(1 <= len(c) <= 9 for c in completions)
    assert all(ENCODER.eos_id not in c[:-1] for c in completions)
    assert all(c[-1] == ENCODER.eos_id for c in completions if len(c) < 9)
    assert {ENCODER.ended(c) for c in completions} == {True, False}


def test_S2_several_answers_to_a_prompt_read_it_once_and_are_those_of_prompts_read_alone():
    policy, read = likely_to_end(nano(ENCODER)).eval(), []
    policy.register_forward_pre_hook(lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    prompts = [PROMPTS[i] for i in (3, 0, 3, 7, 0, 3)]
    uniforms = draw_uniforms(6, 12, 5)
    together = sample(policy, prompts, uniforms, ENCODER, 1.0, 6)
    assert read[0] == (3, max(map(len, prompts))) and all(shape[1] == 1 for shape in read[1:]) and read[1][0] == 6
    assert together == [sample(policy, [p], uniforms[i : i + 1], ENCODER, 1.0, 1)[0] for i, p in enumerate(prompts)]
    assert together[0] != together[2], "the same prompt with other random numbers"


def test_S2_a_policy_that_only_says_eos_and_one_that_never_does():
    for bias in (1e4, -1e4):
        policy, added = nano(ENCODER).eval(), torch.zeros(len(ENCODER.tokenizer))
        added[ENCODER.eos_id] = bias
        policy.lm_head.register_forward_hook(lambda module, args, output, added=added: output + added)
        completions = sample(policy, PROMPTS, draw_uniforms(12, 6, 1), ENCODER, 1.0, 12)
        if bias > 0:
            assert completions == [[ENCODER.eos_id]] * 12
        else:
            assert all(len(c) == 6 and ENCODER.eos_id not in c for c in completions)


def test_S2_rows_that_ended_leave_the_batch():
    """Each row ends at each step with probability 0.1; a pass holds a third more rows than still run, or is filled up to 32, not more."""
    policy, widths = nano(ENCODER).eval(), []

    def one_in_ten(module, args, output):
        widths.append(len(output))
        output[..., ENCODER.eos_id] = -math.inf
        output[..., ENCODER.eos_id] = output.logsumexp(-1) + math.log(0.1 / 0.9)
        return output

    policy.lm_head.register_forward_hook(one_in_ten)
    completions = sample(policy, [PROMPTS[0]] * 128, draw_uniforms(128, 30, 2), ENCODER, 1.0, 128)
    running = [sum(len(c) > step for c in completions) for step in range(len(widths))]
    assert all(width <= max(left / 0.75, left + 32) for width, left in zip(widths, running, strict=True))
    assert running[-1] < 16 and sum(widths) < 0.65 * 128 * 30


# Randomness

class CountsCasts(TorchDispatchMode):
    """How often each of the given weights is copied into another precision."""

    def __init__(self, weights):
        super().__init__()
        self.counts = {w.data_ptr(): 0 for w in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt2", "lora", "llama"])
def test_weights_are_cast_once_for_all_tokens_and_frozen_ones_that_are_held_for_products_never(name):
    """Per token it took longer than the products themselves."""
    policy = POLICIES[name]().eval()
    with torch.autocast("cpu", torch.bfloat16):
        hold_for_products(policy)
        with CountsCasts([p for p in policy.parameters() if p.ndim == 2]) as casts:
            completions = sample(policy, PROMPTS, draw_uniforms(len(PROMPTS), 5, 3), ENCODER, 1.0, len(PROMPTS))
    assert max(map(len, completions)) == 5 and max(casts.counts.values()) == (0 if name == "lora" else 1)


def test_uniform_numbers_follow_from_the_seeds_alone():
    one = draw_uniforms(5, 7, 1, 2)
    torch.rand(10)
    assert torch.equal(draw_uniforms(5, 7, 1, 2), one)
    assert not torch.equal(draw_uniforms(5, 7, 2, 1), one) and not torch.equal(draw_uniforms(5, 7, 12), one)
    assert one.shape == (5, 7) and one.min() >= 0 and one.max() < 1


def test_a_draw_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(5, 4)
    assert _draw(logits, torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.9999]), 1.0).tolist() == [0, 0, 1, 2, 3]


def test_tokens_of_probability_0_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(3, 5)
    assert _draw(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-24]), 1.0).tolist() == [1, 3, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_S1_first_tokens_are_distributed_as_softmax_of_logits_over_temperature(temperature):
    """Chi-square over 6,000 draws; 3.0 standard deviations above its mean would be missed once in 700 seeds, and the seed is fixed."""
    policy = nano(ENCODER, seed=4, scale=0.25).eval()
    count = 6_000
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, 0) * count
    uniforms = draw_uniforms(count, 1, 11)
    drawn = torch.tensor([c[0] for c in sample(policy, [PROMPTS[1]] * count, uniforms, ENCODER, temperature, 2000)])
    observed = torch.bincount(drawn, minlength=len(expected)).double()
    common = expected >= 5
    cells = [*zip(observed[common], expected[common], strict=True), (observed[~common].sum(), expected[~common].sum())]
    statistic = sum(((o - e) ** 2 / e.clamp(min=1)).item() for o, e in cells)
    freedom = len(cells) - 1
    assert freedom > 10
    assert statistic < freedom + 3.0 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("model", [nano, llama])
def test_adapters_are_in_the_weights_while_it_samples_and_the_weights_come_back_to_the_bit(model):
    policy = rough(add_lora(model(ENCODER), 2, 4, "CAUSAL_LM"), 5, 0.2).eval()
    ids, before = torch.tensor(PROMPTS[:1]), snapshot(policy)
    plain = copy.deepcopy(policy).merge_and_unload()
    with torch.no_grad():
        adapted = policy(input_ids=ids).logits
        with pytest.raises(KeyError), adapters_merged(policy):
            merged = policy.get_base_model()(input_ids=ids).logits
            raise KeyError
        again = policy(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16), adapters_merged(policy):
            assert {layer.get_base_layer().weight.dtype for layer in adapted_layers(policy)} == {torch.bfloat16}
    torch.testing.assert_close(merged, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, adapted) and not torch.allclose(adapted, logits_without_adapters(policy, ids), atol=1e-2)
    assert all(torch.equal(weights, before[name]) for name, weights in snapshot(policy).items())


def logits_without_adapters(policy, ids):
    """What the model says without its adapters."""
    with policy.disable_adapter(), torch.no_grad():
        return policy(input_ids=ids).logits


# What a backbone must be able to do

def test_a_model_that_keeps_a_state_is_refused_before_anything_is_trained():
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(ENCODER.tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(InputError, match=r"\(MambaForCausalLM\) cannot be sampled from here: .*; wanted a causal LM whose layers all attend"):
        check_backbone(mamba, ENCODER, 20)
    for make in (nano, llama):
        check_backbone(make(ENCODER), ENCODER, 20)


def test_a_backbone_too_short_for_the_rows_is_refused():
    opt = OPTForCausalLM(OPTConfig(vocab_size=len(ENCODER.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                                   max_position_embeddings=CONTEXT, word_embed_proj_dim=16)).eval()
    for model in (nano(ENCODER), opt):
        check_backbone(model, ENCODER, CONTEXT)
        with pytest.raises(InputError, match=f"{CONTEXT} positions; lower data.max_prompt_tokens"):
            check_backbone(model, ENCODER, CONTEXT + 1)
