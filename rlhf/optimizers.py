"""Optimizers beyond AdamW as torch has it, and learning rates as functions of the step, so that a resumed run needs no scheduler state."""

import torch


def pretraining_optimizers(model, lr: float, matrix_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, as torch has it) for the matrices inside the blocks, AdamW for embeddings, norms and biases.

    Muon's matrices are dealt out to two optimizers, which threads may step side by side.
    On the quickstart's text Muon needed about half of AdamW's tokens (configs/EXPERIMENTS.md).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    by_size = sorted(matrices, key=torch.numel)
    muons = [torch.optim.Muon([{"params": half, "lr_scale": matrix_lr}], lr=matrix_lr, weight_decay=weight_decay, momentum=0.95)
             for half in (by_size[::2], by_size[1::2])]
    adam = torch.optim.AdamW([{"params": others, "lr_scale": lr}], lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [*muons, adam]


def step_as_one_number(optimizer: torch.optim.Optimizer) -> None:
    """From now on `optimizer` multiplies each tensor of its groups with a true `one_number` by one factor a step, as if it were a single number.

    Its gradient, and what a step makes of it, are projected on the tensor itself: the entries keep their proportions.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def gradients_along(optimizer, *_):
        tensors = [p for g in optimizer.param_groups if g.get("one_number") for p in g["params"] if p.grad is not None]
        before[:] = [(p, p.detach().clone()) for p in tensors]
        for p, old in before:
            p.grad = _along(p.grad, old)

    @torch.no_grad()
    def steps_along(*_):
        for p, old in before:
            p.copy_(_along(p, old))
        before.clear()

    optimizer.register_step_pre_hook(gradients_along)
    optimizer.register_step_post_hook(steps_along)


def _along(vector: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return direction * ((vector * direction).sum() / direction.square().sum())


def linear_lr(step: int, steps: int, warmup: float = 0.0) -> float:
    """Share of the peak rate in `step` of `steps`: up over the first `warmup` share, then linearly down to 0 at the end (CANON P5)."""
    rising = max(1, int(warmup * steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def set_lr(optimizer, lr: float, still: str | None = None) -> float:
    """Sets every group to `lr` (times the group's own `lr_scale` where it has one), those of the network named `still` to 0; returns `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if still is not None and group.get("network") == still else lr * group.get("lr_scale", 1.0)
    return lr
