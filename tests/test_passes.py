"""Forward passes over padded rows: the same numbers as one unpadded row at a time (CANON B2, B4, A3)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from rlhf.models import add_lora, load_encoder, load_policy, load_reward_model, save_model
from rlhf.passes import (
    CHANGES_LOGITS,
    LONG,
    SHORT,
    PolicyAndValue,
    ValueModel,
    by_tokens,
    even_groups,
    logprob_sums,
    make_rows,
    policy_pass,
    tight_groups,
)
from tests.helpers import CONTEXT, linear_head, llama, naive_logprobs, nano, rough, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 6)
COMPLETIONS = [ENCODER.completion_ids(t) for t in ("cold", "", "Apples, pears and plums.", "I do not know", "twelve", "a")]
COMPLETIONS[3] = COMPLETIONS[3][:-1]  # one that did not end
PAIRS = list(zip(PROMPTS, COMPLETIONS, strict=True))


def granite():
    """A model that divides its logits by a constant after the output layer."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(5)
    config = GraniteConfig(vocab_size=len(ENCODER.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, max_position_embeddings=CONTEXT, logits_scaling=3.0, attn_implementation="eager")
    return rough(GraniteForCausalLM(config), 5)


def gemma4():
    """A model that caps its logits, and says so among the settings of its text alone."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    torch.manual_seed(6)
    text = dict(vocab_size=len(ENCODER.tokenizer), vocab_size_per_layer_input=len(ENCODER.tokenizer), hidden_size=32, intermediate_size=48,
                hidden_size_per_layer_input=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_kv_shared_layers=0, head_dim=16,
                global_head_dim=16, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=CONTEXT,
                pad_token_id=ENCODER.pad_id, eos_token_id=ENCODER.eos_id, final_logit_softcapping=0.5)
    return rough(Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=None, audio_config=None)), 6)


POLICIES = {
    "gpt2": lambda: nano(ENCODER),
    "gpt2, fused attention": lambda: nano(ENCODER, attention="sdpa"),
    "llama": lambda: llama(ENCODER),
    "logits divided by 3": granite,
    "logits capped, as the settings of its text say": gemma4,
    "lora": lambda: rough(add_lora(nano(ENCODER), 4, 8, "CAUSAL_LM"), 8, 0.05),
}


def rows(pairs=None, pad_id=None):
    pairs = PAIRS if pairs is None else pairs
    return make_rows([p for p, _ in pairs], [c for _, c in pairs], ENCODER.pad_id if pad_id is None else pad_id, "cpu")


# What rows are made of

def test_rows_by_hand():
    made = make_rows([[5, 6], [7]], [[8, 2], [9, 9, 2]], 0, "cpu")
    assert made.ids_BT.tolist() == [[5, 6, 8, 2, 0, 0, 0, 0], [7, 9, 9, 2, 0, 0, 0, 0]]  # widths are multiples of 8
    assert made.mask_BC.tolist() == [[True, True, False], [True, True, True]]
    assert made.before_N.tolist() == [1, 2, 8, 9, 10]  # flat places of 6, 8 | 7, 9, 9
    assert made.targets_N.tolist() == [8, 2, 9, 9, 2]
    assert made.last_B.tolist() == [3, 3] and made.tokens == 8
    assert made.spread(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert made.spread(torch.arange(1.0, 6.0), fill=-1.0)[0, 2] == -1


def test_A3_a_completion_without_tokens_is_refused():
    with pytest.raises(ValueError, match="A3"):
        make_rows([[5], [6]], [[7], []], 0, "cpu")


# Numbers

@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_B2_logprobs_of_padded_rows_are_those_of_each_row_alone(name, temperature):
    policy = POLICIES[name]().eval()
    with torch.no_grad():
        logprobs, entropy, _ = policy_pass(policy, rows(), temperature, entropies=True)
        alone, none, _ = policy_pass(policy, rows(), temperature)
    assert torch.equal(alone, logprobs) and none is None
    for b, (prompt, completion) in enumerate(PAIRS):
        expected = naive_logprobs(policy, prompt, completion, temperature)
        torch.testing.assert_close(logprobs[b, : len(completion)].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
        assert logprobs[b, len(completion):].eq(0).all() and entropy[b, len(completion):].eq(0).all()
        assert (entropy[b, : len(completion)] > 0).all()


@pytest.mark.parametrize("pad_id", [0, 77, ENCODER.eos_id])
def test_B2_which_id_pads_does_not_matter(pad_id):
    model = PolicyAndValue(nano(ENCODER), ValueModel(nano(ENCODER, 1).base_model, linear_head(64))).eval()
    with torch.no_grad():
        for ours, other in zip(model(rows(), 1.0), model(rows(pad_id=pad_id), 1.0), strict=True):
            torch.testing.assert_close(other, ours, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_P6_a_value_is_read_before_each_completion_token(kind):
    policy, head = nano(ENCODER).eval(), linear_head(64)
    trunk = nano(ENCODER, 1).base_model.eval()
    model = PolicyAndValue(policy, ValueModel(trunk if kind == "separate" else None, head))
    with torch.no_grad():
        values = model(rows(), 1.0)[2]
        for b, (prompt, completion) in enumerate(PAIRS):
            source = trunk if kind == "separate" else policy.base_model
            hidden = source(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            expected = [float(hidden[len(prompt) - 1 + t] @ head.weight[0] + head.bias[0]) for t in range(len(completion))]
            torch.testing.assert_close(values[b, : len(completion)], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert values[~rows().mask_BC].eq(0).all()


def test_P6_a_value_does_not_see_the_token_it_stands_before():
    model = PolicyAndValue(nano(ENCODER), ValueModel(nano(ENCODER, 1).base_model, linear_head(64))).eval()
    with torch.no_grad():
        one, other = (model(make_rows([PROMPTS[0]], [[40, 41, last]], ENCODER.pad_id, "cpu"), 1.0)[2] for last in (42, 90))
    assert torch.equal(one, other)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_logprob_sums_are_in_the_order_given_whatever_the_budget(budget):
    policy = nano(ENCODER).eval()
    expected = [sum(naive_logprobs(policy, p, c, 1.0)) for p, c in PAIRS]
    assert logprob_sums(policy, PAIRS, ENCODER.pad_id, 1.0, budget) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_B4_dropout_is_off_in_loaded_models_even_while_training(tmp_path, kind):
    model = nano(ENCODER) if kind == "gpt2" else llama(ENCODER)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.5)
    save_model(model, ENCODER, tmp_path)
    encoder = load_encoder(str(tmp_path))
    for load in (load_policy, load_reward_model):
        loaded = load(str(tmp_path), encoder, "eager").train()
        ids = torch.tensor([PROMPTS[1] + COMPLETIONS[2]])
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_B4_dropout_is_off_in_the_text_model_inside_another(tmp_path):
    """Gemma 3 has its settings, dropout among them, in a text_config."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(ENCODER.tokenizer), "num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.5}
    config = Gemma3Config(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14, "attention_dropout": 0.5},
                          mm_tokens_per_image=4)
    save_model(Gemma3ForConditionalGeneration(config), ENCODER, tmp_path)
    encoder = load_encoder(str(tmp_path))
    for load in (load_policy, load_reward_model):
        loaded = load(str(tmp_path), encoder, "eager").train()
        assert loaded.config.text_config.attention_dropout == loaded.config.vision_config.attention_dropout == 0.0
        ids = torch.tensor([PROMPTS[1] + COMPLETIONS[2]])
        kinds = torch.zeros_like(ids)
        with torch.no_grad():
            first, second = (loaded(input_ids=ids, token_type_ids=kinds).logits for _ in range(2))
        assert torch.equal(first, second)


# Microbatches

def padded(length):
    """Widths are multiples of 8."""
    return -(-length // 8) * 8


@given(st.one_of(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.lists(st.sampled_from([3, 8, 9, 200]), min_size=1, max_size=80)),
       st.integers(1, 20_000), st.integers(1, 8), st.sampled_from([by_tokens, tight_groups, even_groups]), st.sampled_from([SHORT, LONG]))
def test_P4_groups_hold_every_row_once_within_the_budget(lengths, budget, at_least, grouped, cost):
    groups = grouped(lengths, budget, at_least, cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * padded(max(lengths[i] for i in group)) <= budget for group in groups)
    assert len(groups) >= min(at_least, len(lengths)) and all(groups)


def test_P4_groups_by_hand():
    assert by_tokens([5, 2, 2, 19, 2], 32) == [[1, 2, 4, 0], [3]]
    assert by_tokens([5, 2, 2, 19, 2], 16) == [[1, 2], [4, 0], [3]]
    assert list(map(len, by_tokens([8] * 31 + [200], 256))) == [16, 15, 1]
    assert by_tokens([3, 3, 3, 3], 100) == [[0, 1, 2, 3]]
    assert sorted(map(len, by_tokens([3, 3, 3, 3], 100, at_least=3))) == [1, 1, 2]


def total(lengths, groups, cost):
    """Tokens with padding, and those that the passes are worth."""
    return sum(len(group) * padded(max(lengths[i] for i in group)) + cost.tokens for group in groups)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=100), st.integers(300, 20_000), st.sampled_from([SHORT, LONG]))
def test_P4_tight_groups_never_cost_more(lengths, budget, cost):
    assert total(lengths, tight_groups(lengths, budget, cost=cost), cost) <= total(lengths, by_tokens(lengths, budget, cost=cost), cost)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=100), st.integers(300, 20_000), st.integers(2, 4))
def test_P4_even_groups_wait_for_the_slowest_no_longer_than_tight_ones_of_as_many_rows(lengths, budget, workers):
    groups, tight = even_groups(lengths, budget, workers), tight_groups(lengths, budget)
    if len(tight) > workers:
        assert groups == tight
    elif all(len(group) % 8 == 0 for group in tight[:-1]):  # a cut that even_groups could have made too
        slowest, of_tight = (max(len(group) * padded(max(lengths[i] for i in group)) for group in made) for made in (groups, tight))
        assert slowest <= of_tight


def test_P4_even_groups_by_hand():
    """Two workers; cuts lie at multiples of 8 rows."""
    # the wider half of 64 rows would cost 32 x 40 = 1,280; 40 x 24 and 24 x 40 cost 960 each
    assert list(map(len, even_groups([24] * 40 + [40] * 24, 10_000, 2))) == [40, 24]
    # 40 x 32 and 24 x 32: the costliest of 32 rows each is cheaper
    assert even_groups([32] * 64, 10_000, 2) == [list(range(32)), list(range(32, 64))]
    # 8 and 12 rows: after 16 the costliest would have 640 tokens and not 480
    assert list(map(len, even_groups([40] * 20, 10_000, 2))) == [8, 12]
    # three groups of 32 rows have no room for fewer, and each worker takes the next when it is free
    assert list(map(len, even_groups([8] * 96, 256, 2))) == [32, 32, 32]


def test_P4_tight_groups_of_long_passes_by_hand():
    """A pass is worth 96 tokens, and cuts lie anywhere."""
    # together 4 x 200 + 96 = 896; in two 2 x 48 + 2 x 200 + 2 x 96 = 688; in three, 40 and 48 apart too, 40 + 48 + 400 + 3 x 96 = 776
    assert tight_groups([200, 40, 195, 48], 10_000, cost=LONG) == [[1, 3], [2, 0]]
    # together 3 x 120 + 96 = 456; cut after the first 40 + 240 + 192 = 472
    assert tight_groups([120, 40, 120], 10_000, cost=LONG) == [[1, 0, 2]]


def test_P4_tight_groups_by_hand():
    """A pass is worth 512 tokens."""
    # together 32 x 200 + 512 = 6,912; apart 16 x 8 + 512 and 16 x 200 + 512 = 4,352
    assert tight_groups([200] * 16 + [8] * 16, 10_000) == [list(range(16, 32)), list(range(16))]
    # together 32 x 32 + 512 = 1,536; apart 16 x 8 + 512 and 16 x 32 + 512 = 1,664
    assert tight_groups([32] * 16 + [8] * 16, 10_000) == [[*range(16, 32), *range(16)]]
    # cuts lie at multiples of 16 rows, and both kinds of the wide rows go together: 3 x 16 narrow ones, then 16 with the rest
    assert list(map(len, tight_groups([8] * 50 + [96] * 13 + [104], 10_000))) == [48, 16]
    assert tight_groups([8] * 15 + [250], 10_000) == [list(range(16))]


def test_models_that_change_their_logits_after_the_output_layer_are_known_by_their_settings():
    """Names as the configurations of Gemma 2, Cohere, Granite, RecurrentGemma, xLSTM, Falcon-H1 and Inkling have them, and some of other things."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "output_logit_soft_cap", "lm_head_multiplier",
                 "logits_mup_width_multiplier"):
        assert CHANGES_LOGITS.match(name), name
    for name in ("attn_logit_softcapping", "num_logits_to_keep", "output_router_logits", "moe_router_logit_softcapping"):
        assert not CHANGES_LOGITS.match(name), name
