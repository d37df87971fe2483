"""A prompt read once for all its answers (CANON R4): the scores and gradients of rows that each have the prompt of their own."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig, MistralConfig

from rlhf.losses import ranking_loss
from rlhf.models import add_lora, init_reward_head
from rlhf.rankings import collate_rankings
from rlhf.shared_prompts import can_share, collate_shared, pays, shared_rewards

SHAPE = {"vocab_size": 60, "num_labels": 1, "pad_token_id": 0}
LLAMA = {**SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "gpt2": GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": LlamaConfig(**LLAMA),
}
ROWS = [{"prompt": [3, 4, 5], "completions": [[6, 7, 1], [8, 1]], "ranks": [2, 1], "margin": 0.5},
        {"prompt": [9, 10, 11, 12, 13, 14, 15], "completions": [[6, 1], [5, 4, 3, 2, 1], [7, 7, 7, 1]], "ranks": [1, 2, 3], "margin": 0.0},
        {"prompt": [20], "completions": [[21, 22, 23, 24, 25, 1]] + [[k, 1] for k in range(30, 38)], "ranks": list(range(1, 10)), "margin": 0.0}]


def reward_model(config, attention="eager"):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    init_reward_head(model, torch.Generator().manual_seed(1))
    return model


def alone(model, rows):
    batch = collate_rankings(rows, 0)
    return model(input_ids=batch["ids_NT"], attention_mask=batch["mask_NT"].long()).logits[:, 0][batch["places_BK"]], batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [*MODELS, "llama, lora"])
def test_R4_scores_and_gradients_are_those_of_answers_with_prompts_of_their_own(kind, attention):
    model = reward_model(MODELS[kind.split(",")[0]], attention)
    inner = add_lora(model, 2, 4, "SEQ_CLS").get_base_model() if "lora" in kind else model
    gradients, scores = [], []
    for rewards_BK, batch in (alone(inner, ROWS), (shared_rewards(inner, collate_shared(ROWS, 0)["shared"]), collate_shared(ROWS, 0))):
        loss, count = ranking_loss(rewards_BK, batch["ranks_BK"], batch["margin_B"])
        inner.zero_grad()
        (loss / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in inner.parameters() if p.grad is not None]))
        scores.append(rewards_BK.detach()[batch["ranks_BK"] > 0])
    assert len(scores[0]) == 2 + 3 + 9 and scores[0].std() > 0.1
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    assert (gradients[1] - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()


def test_R4_a_prompts_answers_do_not_see_each_other():
    model = reward_model(MODELS["gpt2"])
    one = shared_rewards(model, collate_shared(ROWS[1:2], 0)["shared"])[0]
    other = [{**ROWS[1], "completions": [[40, 1], *ROWS[1]["completions"][1:]]}]
    two = shared_rewards(model, collate_shared(other, 0)["shared"])[0]
    assert torch.equal(one[1:], two[1:]) and one[0] != two[0]


def test_collate_shared_by_hand():
    batch = collate_shared(ROWS[:1], 0)
    assert batch["tokens"] == 3 + 3 + 2 and batch["ranks_BK"].tolist() == [[2, 1]] and batch["margin_B"].tolist() == [0.5]
    assert {name: part.tolist() for name, part in batch["shared"].items()} == {
        "ids_BT": [[3, 4, 5, 6, 7, 1, 8, 1]], "positions_BT": [[0, 1, 2, 3, 4, 5, 3, 4]], "answer_BT": [[0, 0, 0, 1, 1, 1, 2, 2]],
        "last_BK": [[5, 7]]}


def test_it_pays_for_long_prompts_and_not_for_long_answers():
    long_prompt = {"prompt": [3] * 40, "completions": [[4] * 8] * 4}
    # alone: 4 rows of 48 tokens x (16 + 48) = 12,288; together: a row of 72 x (16 + 72) = 6,336
    assert pays([long_prompt], 32)
    # alone: 4 rows of 48 tokens x (16 + 48) = 12,288; together: a row of 168 x (16 + 168) = 30,912
    long_answers = {"prompt": [3] * 8, "completions": [[4] * 40] * 4}
    assert not pays([long_answers], 32)
    # in a wide model attention counts less: 4 x 48 x (512 + 48) = 107,520 against 168 x (512 + 168) = 114,240, with nine tokens more a prompt it pays
    assert not pays([long_answers], 1024)
    assert pays([{"prompt": [3] * 17, "completions": [[4] * 39] * 4}], 1024)  # 4 x 56 x 568 = 127,232 against 176 x 688 = 121,088


def test_models_that_cannot_are_found_out():
    assert all(can_share(reward_model(MODELS[kind], attention), 0) for kind in MODELS for attention in ("eager", "sdpa"))
    bert = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=1)
    assert not can_share(reward_model(bert).eval(), 0), "its head reads its first token, not the last one"
    assert not can_share(reward_model(MistralConfig(**LLAMA, sliding_window=4)), 0), "far tokens would come into sight"
    deaf = reward_model(MODELS["llama"])
    plain = deaf.base_model.forward
    deaf.base_model.forward = lambda input_ids=None, attention_mask=None, position_ids=None, **how: plain(input_ids=input_ids, **how)
    assert not can_share(deaf, 0), "masks and positions are ignored"
