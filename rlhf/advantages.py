"""Token rewards, generalised advantage estimation, whitening (CANON S3, P1, P2). Shapes: B rows, C completion tokens."""

import torch

from rlhf.kl import k1


def token_rewards(scores_B, logprobs_BC, ref_logprobs_BC, mask_BC, kl_coef: float, likelihood_coef: float = 0.0) -> torch.Tensor:
    """-kl_coef·(logprob - ref_logprob) on real tokens, the score added on the last real one, 0 on padding (LHP eq. 2).

    With a likelihood_coef every real token gets likelihood_coef·ref_logprob too.
    """
    rewards_BC = torch.where(mask_BC, -kl_coef * k1(logprobs_BC, ref_logprobs_BC), 0.0)
    # DEPARTS: S3 has no such term; a small model often knows better than its reward model can check ("sharpening", Huang et al. 2024, 2412.01951)
    if likelihood_coef:
        rewards_BC += torch.where(mask_BC, likelihood_coef * ref_logprobs_BC, 0.0)
    rows = torch.arange(len(scores_B), device=scores_B.device)
    rewards_BC[rows, mask_BC.sum(1) - 1] += scores_B
    return rewards_BC


def gae(rewards_BC, values_BC, mask_BC, gamma: float = 1.0, lam: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), both [B, C], not whitened, 0 on padding (GAE eq. 16; returns = advantages + values).

    The value after the last real token is 0: a completion is a finished episode.
    """
    rewards_BC, values_BC = torch.where(mask_BC, rewards_BC, 0.0), torch.where(mask_BC, values_BC, 0.0)
    advantages_BC = torch.zeros_like(rewards_BC)
    next_value_B = next_advantage_B = torch.zeros_like(rewards_BC[:, 0])
    for t in reversed(range(rewards_BC.shape[1])):
        delta_B = rewards_BC[:, t] + gamma * next_value_B - values_BC[:, t]
        next_advantage_B = torch.where(mask_BC[:, t], delta_B + gamma * lam * next_advantage_B, 0.0)
        next_value_B = values_BC[:, t]
        advantages_BC[:, t] = next_advantage_B
    return advantages_BC, torch.where(mask_BC, advantages_BC + values_BC, 0.0)


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[count, sum, sum of squares] over real tokens in float64: add them over processes, then `whiten`."""
    real = values[mask].double()
    return torch.stack([torch.tensor(float(real.numel()), dtype=torch.float64, device=values.device), real.sum(), real.square().sum()])


def whiten(values: torch.Tensor, mask: torch.Tensor, moments_3: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Mean 0 (unless `shift_mean` is False) and variance 1 over the tokens behind `moments_3`, 0 on padding (CANON P2: biased, eps 1e-8)."""
    count, total, squares = moments_3.unbind()
    mean = total / count
    scale = torch.rsqrt((squares / count - mean.square()).clamp(min=0) + 1e-8)
    whitened = (values.double() - mean) * scale
    return torch.where(mask, (whitened if shift_mean else whitened + mean).to(values.dtype), 0.0)
