"""KL divergence to the reference policy: estimators and the coefficient's controller (CANON P7, P8)."""

import torch


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log p - log q per token, nats: unbiased, can be negative; the estimator in the reward."""
    return logprobs - ref_logprobs


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p) per token, nats: unbiased, never negative (Schulman, "Approximating KL divergence", 2020)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The coefficient after a rollout of `completions` with `kl` nats per completion (LHP §2.2: error clipped to ±0.2)."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * completions / horizon)
