"""A prompt with all its answers as one row that holds the prompt once (CANON R4): answers see the prompt and themselves, never each other.

A ranking of K answers then costs one prompt and K answers instead of K prompts and K answers, with the same scores: in a causal model what a
prompt's tokens compute does not depend on what follows them. Such rows are longer, and attention grows with the square of their length: `pays`
decides batch by batch. Models that look ahead (BERT), keep a state (Mamba) or count positions their own way are found out by
`can_share` and read each answer with a prompt of its own.
Shapes: B prompts, K answers of a prompt, T tokens of a prompt and all its answers.
"""

import inspect

import torch

from rlhf.masking import WIDTH_STEP, right_pad, round_up
from rlhf.models import as_written
from rlhf.rankings import ranks_and_margins


def pays(rows: list[dict], hidden_size: int) -> bool:
    """Whether one row a prompt costs less than one row an answer.

    A padded token's cost is taken as hidden_size / 2 + width of its row, linear layers and attention: an estimate that fits what was timed
    (configs/EXPERIMENTS.md, "A PPO step timed").
    """
    def cost(lengths: list[int]) -> int:
        width = round_up(max(lengths), WIDTH_STEP)
        return len(lengths) * width * (hidden_size // 2 + width)

    alone = [len(row["prompt"]) + len(completion) for row in rows for completion in row["completions"]]
    together = [len(row["prompt"]) + sum(map(len, row["completions"])) for row in rows]
    return cost(together) < cost(alone)


def collate_shared(rows: list[dict], pad_id: int) -> dict:
    """What `rlhf.rankings.collate_rankings` makes, with one row a prompt.

    shared: ids_BT, positions_BT (an answer's go on from its prompt's), answer_BT (0 in a prompt, 1 to K in an answer, -1 on padding) and
    last_BK, where each answer ends (0 where K differs); tokens: real ones; ranks_BK, margin_B.
    """
    ids = [row["prompt"] + [token for completion in row["completions"] for token in completion] for row in rows]
    positions, answer, last = [], [], []
    for row in rows:
        start = end = len(row["prompt"])
        positions.append(list(range(start)))
        answer.append([0] * start)
        last.append([])
        for number, completion in enumerate(row["completions"], 1):
            positions[-1] += range(start, start + len(completion))
            answer[-1] += [number] * len(completion)
            end += len(completion)
            last[-1].append(end - 1)
    shared = {"ids_BT": right_pad(ids, pad_id, WIDTH_STEP), "positions_BT": right_pad(positions, 0, WIDTH_STEP),
              "answer_BT": right_pad(answer, -1, WIDTH_STEP), "last_BK": right_pad(last, 0)}
    return {"shared": shared, "tokens": sum(map(len, ids)), **ranks_and_margins(rows)}


def shared_rewards(reward_model, shared: dict[str, torch.Tensor]) -> torch.Tensor:
    """rewards_BK, fp32, of a batch's `shared`: the head's output at the last token of each answer (CANON R2)."""
    answer_BT, ids_BT = shared["answer_BT"], shared["ids_BT"]
    width = answer_BT.shape[1]
    before_TT = torch.ones(width, width, dtype=torch.bool, device=ids_BT.device).tril()
    visible_BTT = before_TT & ((answer_BT[:, None, :] == 0) | (answer_BT[:, None, :] == answer_BT[:, :, None]))
    mask_B1TT = torch.zeros(visible_BTT.shape, device=ids_BT.device).masked_fill_(~visible_BTT, torch.finfo(torch.float32).min)[:, None]
    hidden_BTD = reward_model.base_model(
        input_ids=ids_BT, attention_mask=mask_B1TT, position_ids=shared["positions_BT"], use_cache=False).last_hidden_state
    last_BKD = hidden_BTD[torch.arange(len(ids_BT), device=ids_BT.device)[:, None], shared["last_BK"]]
    return reward_model.score(last_BKD)[..., 0].float()


@torch.no_grad()
def can_share(reward_model, pad_id: int) -> bool:
    """Whether the model gives two answers behind one prompt the scores that each gets alone; tried on made-up ids."""
    takes = inspect.signature(reward_model.base_model.forward).parameters
    if "position_ids" not in takes or not hasattr(reward_model, "score") or reward_model.config._attn_implementation not in ("eager", "sdpa"):
        return False
    if getattr(reward_model.config.get_text_config(), "sliding_window", None):
        return False  # its mask would be lost
    ids = [i for i in range(min(64, reward_model.config.get_text_config().vocab_size)) if i != pad_id]
    row = {"prompt": ids[:5], "completions": [ids[5:12], ids[3:7], ids[1:2]], "ranks": [1, 2, 3], "margin": 0.0}
    shared = {name: part.to(reward_model.device) for name, part in collate_shared([row], pad_id)["shared"].items()}
    rows = [torch.tensor([row["prompt"] + c], device=reward_model.device) for c in row["completions"]]
    try:
        with as_written():
            together = shared_rewards(reward_model, shared)[0]
            alone = [reward_model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0, 0] for ids_1T in rows]
    except Exception:  # architectures fail in many ways at masks or positions of another shape; training itself would not forgive them
        return False
    return torch.allclose(torch.stack(alone).float(), together, rtol=1e-3, atol=1e-3)
