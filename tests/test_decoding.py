"""One more token: buffers of keys and values, the attention of one query a row, and the small GPT's step beside that of `transformers`."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import Cache

from rlhf.decoding import ONE_TOKEN, BufferLayer, _one_token_attention, attention_for_sampling, decoder
from rlhf.masking import left_pad, left_pad_mask, positions
from rlhf.models import adapters_merged, add_lora
from rlhf.sampling import draw_uniforms, sample
from tests.helpers import llama, nano, rough, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 6)


# Buffers

def test_B2_parts_of_a_batch_are_joined_flush_right_by_hand():
    parts = [BufferLayer(), BufferLayer()]
    for part, states in zip(parts, ([[1.0, 2, 3]], [[4.0], [5]]), strict=True):
        part.update(torch.tensor(states)[:, None, :, None], -torch.tensor(states)[:, None, :, None])
    joined = BufferLayer.joined(parts)
    assert joined.keys[:, 0, :, 0].tolist() == [row + [0.0] * 13 for row in ([1, 2, 3], [0, 0, 4], [0, 0, 5])]
    assert torch.equal(joined.values, -joined.keys) and joined.get_seq_length() == 3
    joined.update(torch.full((3, 1, 1, 1), 6.0), torch.zeros(3, 1, 1, 1))
    assert joined.keys[:, 0, 2:4, 0].tolist() == [[3, 6], [4, 6], [5, 6]]


def test_keys_are_held_in_the_precision_of_the_values():
    layer = BufferLayer()
    keys, values = layer.update(torch.full((1, 1, 2, 1), 1.001), torch.ones(1, 1, 2, 1, dtype=torch.bfloat16))
    assert keys.dtype == values.dtype == layer.dtype == torch.bfloat16 and keys[0, 0, :3, 0].tolist() == [1.0, 1.0, 0.0]
    keys, _ = layer.update(torch.full((1, 1, 1, 1), 2.001), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
    assert keys.dtype == torch.bfloat16 and keys[0, 0, :4, 0].tolist() == [1.0, 1.0, 2.0, 0.0]


# Attention

@pytest.mark.parametrize("model", [llama, nano, lambda encoder: add_lora(llama(encoder), 2, 4, "CAUSAL_LM")])
@pytest.mark.parametrize("fused", [True, False])
def test_models_that_have_sdpa_are_sampled_from_with_another_attention_than_they_are_trained_with(model, fused, monkeypatch):
    policy, seen = model(ENCODER).eval(), []
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    inner.set_attn_implementation("eager")
    inner.base_model.register_forward_pre_hook(lambda *_: seen.append(inner.config._attn_implementation))
    monkeypatch.setattr(type(inner), "_supports_sdpa", fused)
    sample(policy, PROMPTS[:2], draw_uniforms(2, 3, 0), ENCODER, 1.0, 2)
    assert set(seen) == {ONE_TOKEN if fused else "eager"} and inner.config._attn_implementation == "eager"


def test_B2_attention_of_one_token_shares_keys_and_values_among_heads_and_leaves_out_what_is_masked():
    """Two pairs of heads of width 2, three columns, the last masked. By hand: with keys (ln 2, 0) and (0, ln 4) a query (1, 0) weighs the first two
    columns 2 : 1, a query (0, 1) 1 : 4; heads 3 and 4 have keys of zero, and weigh them 1 : 1."""
    a, b = math.log(2), math.log(4)
    query = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])[None, :, None]
    key = torch.tensor([[[a, 0.0], [0, b], [9, 9]], [[0, 0], [0, 0], [9, 9]]])[None]
    value = torch.tensor([[[3.0, 0], [0, 30], [99, 99]], [[2, 0], [0, 4], [99, 99]]])[None]
    output, _ = _one_token_attention(None, query, key, value, torch.tensor([True, True, False])[None, None, None], scaling=1.0)
    assert output.shape == (1, 1, 4, 2)
    assert torch.allclose(output[0, 0], torch.tensor([[2, 10.0], [0.6, 24], [1, 2], [1, 2]]))
    unmasked, _ = _one_token_attention(None, query, key[:, :, :2], value[:, :, :2], None, scaling=1.0)
    assert torch.equal(unmasked, output)
    halved, _ = _one_token_attention(None, query, key, value, torch.tensor([True, True, False])[None, None, None], scaling=0.5)
    assert torch.allclose(halved[0, 0, 1], torch.tensor([1.0, 20]))  # 1 : 2


# The small GPT's step

def by_inverse_layer(encoder):
    """A GPT-2 with what no model of ours has: the tanh's GELU, scores that shrink with depth, a wide MLP."""
    torch.manual_seed(2)
    return rough(GPT2LMHeadModel(GPT2Config(vocab_size=len(encoder.tokenizer), n_positions=64, n_embd=24, n_layer=3, n_head=3, n_inner=40,
                                            scale_attn_by_inverse_layer_idx=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                            attn_implementation="eager")), 2)


def two_tokens(policy, way):
    """Logits after two more tokens for each of six padded prompts; `way` makes the function that takes a token."""
    mask_BT = left_pad_mask([len(p) for p in PROMPTS])
    width, layers = mask_BT.shape[1], [BufferLayer() for _ in range(policy.config.num_hidden_layers)]
    seen_BT = torch.cat([mask_BT, mask_BT.new_zeros(len(PROMPTS), 64)], 1)
    found = []
    with torch.no_grad(), adapters_merged(policy), attention_for_sampling(policy):
        policy(input_ids=left_pad(PROMPTS, ENCODER.pad_id), position_ids=positions(mask_BT), attention_mask=seen_BT[:, : -(-width // 16) * 16],
               past_key_values=Cache(layers=layers), use_cache=True)
        decode = way(policy)
        for extra in range(2):
            seen_BT[:, width + extra] = True
            ids_B1 = torch.arange(10 * extra, 10 * extra + len(PROMPTS))[:, None]
            found.append(decode(ids_B1, mask_BT.sum(1, keepdim=True) + extra, seen_BT[:, : -(-(width + extra + 1) // 16) * 16], layers))
    return torch.stack(found)


def as_transformers_does_it(policy):
    """The same function, with the model called as a whole."""
    return lambda ids_B1, positions_B1, seen_BT, layers: policy(
        input_ids=ids_B1, position_ids=positions_B1, attention_mask=seen_BT, past_key_values=Cache(layers=layers), use_cache=True).logits[:, -1]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("make", [nano, by_inverse_layer, lambda encoder: rough(add_lora(nano(encoder), 2, 4, "CAUSAL_LM"), 5)])
def test_B1_the_small_gpt_says_what_transformers_makes_it_say(make, bf16):
    policy, whole = make(ENCODER).eval(), []
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = two_tokens(policy, as_transformers_does_it)
        inner.forward = lambda *args, _forward=inner.forward, **kwargs: (whole.append(1), _forward(*args, **kwargs))[1]
        found = two_tokens(policy, decoder)
    assert len(whole) == 1, "the prompts alone"
    assert found.shape == (2, len(PROMPTS), len(ENCODER.tokenizer)) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=2**-7 if bf16 else 1e-5, atol=0.02 if bf16 else 1e-5)


class OtherGPT2(GPT2LMHeadModel):
    """What a subclass does to its logits nobody knows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


def test_a_gpt_that_is_not_the_plain_one_or_has_a_listener_is_called_as_a_whole():
    plain, other = nano(ENCODER).eval(), nano(ENCODER).eval()
    other.__class__ = OtherGPT2
    expected = two_tokens(plain, as_transformers_does_it)
    torch.testing.assert_close(two_tokens(other, decoder), -expected)
    for part in (plain, plain.transformer, plain.transformer.h[1], plain.transformer.h[0].attn, plain.transformer.h[0].mlp):
        heard = []
        hook = part.register_forward_hook(lambda *_, heard=heard: heard.append(1))
        torch.testing.assert_close(two_tokens(plain, decoder), expected)
        hook.remove()
        assert len(heard) == 3


def test_flash_attention_is_not_sampled_with(monkeypatch):
    """It would take the room ahead in the buffers for the end of a left-padded mask."""
    policy, asked = nano(ENCODER), []
    policy.config._attn_implementation = "flash_attention_2"  # as it is where that package is there
    monkeypatch.setattr(type(policy), "set_attn_implementation", lambda self, name: asked.append(name))
    with attention_for_sampling(policy):
        assert asked == [ONE_TOKEN]
    assert asked == [ONE_TOKEN, "flash_attention_2"]
