"""Log-probabilities and entropies of given tokens, with the temperature of sampling (CANON S1), and the output layer they come from.

The fused functions never hold all N x V logits: chunks of tokens go through the output layer and are forgotten (the idea of fused linear
losses such as Liger-Kernel's). Their products are in autocast's dtype where it is on, everything else in fp32.

Shapes: N tokens, D hidden width, V vocabulary. Everything comes out in fp32, nats; entropies carry no gradient.
"""

import torch

CHUNK = 2**20  # logits alive at a time, at the least; a chunk of them fits into a core's cache
CHUNK_TOKENS = 256  # at the least: a gradient as large as the output layer is made for every chunk


def token_logprobs(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float, entropies: bool = True) -> tuple[torch.Tensor, ...]:
    """(logprobs_N, entropy_N) of `ids_N` under softmax(logits / temperature); without `entropies` the first alone."""
    log_all_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    logprobs_N = log_all_NV.gather(1, ids_N[:, None])[:, 0]
    return (logprobs_N, _entropies(log_all_NV.detach())) if entropies else (logprobs_N,)


def output_logprobs(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_N: torch.Tensor, temperature: float,
                    entropies: bool = True) -> tuple[torch.Tensor, ...]:
    """token_logprobs of an output layer without bias, logits = hidden·weightᵀ; the backward makes the logits again."""
    return _OutputLogprobs.apply(hidden_ND, weight_VD, ids_N, temperature, entropies)


def linear_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of -log p, without entropies: the forward turns each chunk of logits into the gradient, so none is made twice."""
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, ids_N)


class _OutputLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_N, temperature, entropies_wanted):
        hidden, weight = _for_products(hidden_ND, weight_VD)
        logprobs, entropies, log_zs = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for h, ids in _chunks(weight, hidden, ids_N):
                logits = _logits(h, weight, temperature)
                log_z = logits.logsumexp(1, keepdim=True)
                logprobs.append((logits.gather(1, ids[:, None]) - log_z)[:, 0])
                if entropies_wanted:
                    entropies.append(_entropies(logits.sub_(log_z)))
                log_zs.append(log_z)
        ctx.save_for_backward(hidden, weight, ids_N, torch.cat(log_zs))
        ctx.temperature, ctx.dtypes = temperature, (hidden_ND.dtype, weight_VD.dtype)
        if not entropies_wanted:
            return (torch.cat(logprobs),)
        entropy_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx, grad_N, *_):
        hidden, weight, ids_N, log_z_N1 = ctx.saved_tensors
        grads_hidden, grad_weight = [], None
        for h, ids, log_z, grad in _chunks(weight, hidden, ids_N, log_z_N1, grad_N):
            by_logits = _softmax_less_one_hot(_logits(h, weight, ctx.temperature), log_z, ids)
            by_logits = by_logits.mul_(-grad[:, None] / ctx.temperature).to(weight.dtype)
            grads_hidden.append(by_logits @ weight)
            if ctx.needs_input_grad[1]:  # not with LoRA
                grad_weight = _added(grad_weight, (by_logits.T @ h).to(log_z.dtype))
        return torch.cat(grads_hidden).to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_N):
        hidden, weight = _for_products(hidden_ND, weight_VD)
        loss, grads_hidden, grad_weight = 0.0, [], None
        with torch.autocast(hidden.device.type, enabled=False):
            for h, ids in _chunks(weight, hidden, ids_N):
                logits = _logits(h, weight, 1.0)
                log_z = logits.logsumexp(1, keepdim=True)
                loss = loss + (log_z - logits.gather(1, ids[:, None])).sum()
                by_logits = _softmax_less_one_hot(logits, log_z, ids).to(weight.dtype)
                grads_hidden.append(by_logits @ weight)
                grad_weight = _added(grad_weight, (by_logits.T @ h).to(log_z.dtype))
        ctx.save_for_backward(torch.cat(grads_hidden).to(hidden_ND.dtype), grad_weight.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None


def _entropies(log_all_NV) -> torch.Tensor:
    return -(log_all_NV.exp() * log_all_NV).sum(1)


def _for_products(*tensors):
    """The tensors in autocast's dtype, as they are where it is off."""
    kind = tensors[0].device.type
    return [t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t for t in tensors]


def _chunks(weight, *columns):
    """The columns in matching chunks of tokens."""
    size = max(CHUNK_TOKENS, CHUNK // len(weight))
    return zip(*(column.split(size) for column in columns), strict=True)


def _logits(hidden, weight, temperature: float) -> torch.Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature) if temperature != 1.0 else logits


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """In the place of `total`: both are as large as the output layer."""
    return part if total is None else total.add_(part)


def _softmax_less_one_hot(logits, log_z, ids) -> torch.Tensor:
    """The gradient of -log p by the logits, in their place."""
    return logits.sub_(log_z).exp_().scatter_add_(1, ids[:, None], -torch.ones_like(log_z))
