"""Models whose weights FSDP2 shards among processes, whole for a while: for sampling, scoring, evaluation and saving.

There each process goes through passes of its own number, or the main process alone through any. A sharded model gathers its weights in every
pass, and would wait for ever for processes that make none. Gathered beforehand, passes need nobody else.
"""

import contextlib

import torch
import torch.distributed
from torch import nn


def _units(model: nn.Module) -> list:
    """The parts of a model whose weights FSDP2 gathers at once; none of a model that is not sharded."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


@contextlib.contextmanager
def whole(model: nn.Module):
    """While the block runs every process has all weights, and passes without gradients communicate nothing. All processes enter it together.

    A sharded model must have been called once before. The weights must not change inside. Does nothing to a model that is not sharded.
    """
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def full_weights(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor] | None:
    """All weights by name, in the precision in which they are trained; None of a model that is not sharded.

    All processes call it together, outside `whole` (whose weights are those of the passes); only those that `keep` them get them.
    """
    if not _units(model):
        return None
    named = model.state_dict(keep_vars=True)
    gathered: dict[int, torch.Tensor | None] = {}  # tied weights stay one tensor, which is how transformers knows that they are
    for tensor in named.values():
        if id(tensor) not in gathered:
            whole_one = full(tensor.detach())
            gathered[id(tensor)] = whole_one.cpu() if keep else None
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if keep else {}


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a part; all processes call it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole on all processes, shared out among them as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
