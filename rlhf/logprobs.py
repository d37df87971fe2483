"""Log-probabilities and entropies of given tokens, with the temperature of sampling (CANON S1)."""

import torch


def token_logprobs(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs_N, entropy_N) in fp32, nats, of `ids_N` under softmax(logits / temperature); the entropy carries no gradient."""
    log_all_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy_N = -(log_all_NV.exp() * log_all_NV).sum(-1)
    return log_all_NV.gather(1, ids_N[:, None])[:, 0], entropy_N
