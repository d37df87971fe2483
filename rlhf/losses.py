"""Losses of stages 2 and 3. Each returns a sum and a count; the optimizer step divides once, over all processes (CANON P4).

Shapes: B rows, C completion tokens, K answers of a prompt. Masks are True on real tokens; what stands elsewhere never reaches a loss.
"""

import torch
import torch.nn.functional as F


def policy_loss(logprobs_BC, old_logprobs_BC, advantages_BC, mask_BC, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over real tokens of max(-A·ratio, -A·clip(ratio, 1±clip)), and their count (CANON P3; PPO eq. 7, as a loss)."""
    ratio_BC = torch.exp(torch.where(mask_BC, logprobs_BC - old_logprobs_BC, 0.0))
    plain_BC = -advantages_BC * ratio_BC
    clipped_BC = -advantages_BC * ratio_BC.clamp(1 - clip, 1 + clip)
    return torch.where(mask_BC, torch.maximum(plain_BC, clipped_BC), 0.0).sum(), mask_BC.sum()


def value_loss(values_BC, old_values_BC, returns_BC, mask_BC, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over real tokens of half the larger squared error, of the value and of the value held within ±clip of the old one (P3; N+ 18)."""
    values_BC, old_values_BC, returns_BC = (torch.where(mask_BC, t, 0.0) for t in (values_BC, old_values_BC, returns_BC))
    held_BC = old_values_BC + (values_BC - old_values_BC).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BC - returns_BC).square(), (held_BC - returns_BC).square()).sum(), mask_BC.sum()


def language_model_loss(logprobs_BC, mask_BC) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over real tokens of -log p, and their count."""
    return -torch.where(mask_BC, logprobs_BC, 0.0).sum(), mask_BC.sum()


def ranking_loss(rewards_BK, ranks_BK, margin_B=None, ties: str = "drop") -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over prompts of the mean over that prompt's pairs of -log sigmoid(r_better - r_worse), and the count of prompts (IG eq. 1; CANON R3, R4).

    ranks_BK: 1 is best, equal ranks are a tie, 0 marks an empty place. margin_B is subtracted from the difference (R3).
    ties: "drop" leaves tied pairs out, "half" gives them label one half. A prompt without a pair counts for nothing.
    """
    rewards_BK = torch.where(ranks_BK > 0, rewards_BK, 0.0)
    difference_BKK = rewards_BK[:, :, None] - rewards_BK[:, None, :]
    real_BKK = (ranks_BK[:, :, None] > 0) & (ranks_BK[:, None, :] > 0)
    better_BKK = real_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :])
    if margin_B is not None:
        difference_BKK = difference_BKK - margin_B[:, None, None]
    losses_BKK = torch.where(better_BKK, -F.logsigmoid(difference_BKK), 0.0)
    pairs_BKK = better_BKK
    if ties == "half":
        tied_BKK = (real_BKK & (ranks_BK[:, :, None] == ranks_BK[:, None, :])).triu(1)
        plain_BKK = rewards_BK[:, :, None] - rewards_BK[:, None, :]
        losses_BKK = losses_BKK + torch.where(tied_BKK, -0.5 * (F.logsigmoid(plain_BKK) + F.logsigmoid(-plain_BKK)), 0.0)
        pairs_BKK = better_BKK | tied_BKK
    pairs_B = pairs_BKK.sum((1, 2))
    return (losses_BKK.sum((1, 2)) / pairs_B.clamp(min=1)).sum(), (pairs_B > 0).sum()
