"""Threads that each compute a part of a step with one core, for models so small that sharing every operation among cores does not pay.

At the quickstart's size an operation takes some 0.1 ms: waking a sleeping core for half of it costs as much as it saves
(configs/EXPERIMENTS.md, "Speed on two cores"). Parts that need nothing of each other have no such cost.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from rlhf.compute import sharded
from rlhf.models import parameter_count

LARGEST = 20_000_000  # parameters; beyond, operations are long enough to be shared, and a gradient per part would cost memory


def small(model: torch.nn.Module) -> bool:
    """True where a pass is short beside what is done around it."""
    return parameter_count(model) <= LARGEST


def workers_for(accelerator, model: torch.nn.Module) -> "Workers":
    """A worker for every thread torch has, where one process trains a small model on CPUs; otherwise one, which changes nothing."""
    return Workers(torch.get_num_threads() if small(model) and accelerator.num_processes == 1 and accelerator.device.type == "cpu" else 1)


class Workers:
    """`count` threads with one core each; 1: everything runs in the calling thread with the threads torch has.

    What comes back has the order of what went in, so that sums over it do not depend on who finished first.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = ThreadPoolExecutor(count, "worker", initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None

    def map(self, function: Callable, parts: Iterable) -> list:
        """function(part) of every part, in order. Autocast and no_grad belong to a thread: `function` opens them itself."""
        return list(self.each(function, parts))

    def each(self, function: Callable, parts: Iterable) -> Iterator:
        """The same one by one, so that what was used up can be forgotten while the others are made."""
        if self._pool is None:
            yield from map(function, parts)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for libraries that keep one number for all threads
        try:
            yield from self._pool.map(function, parts)
        finally:
            torch.set_num_threads(threads)


ALONE = Workers(1)


def callers_autocast(device: str) -> Callable:
    """What opens, in another thread, the autocast of the thread that calls this."""
    return functools.partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def accumulate(accelerator, workers: Workers, model: torch.nn.Module, losses: list[Callable]) -> list:
    """Adds the gradient of every loss to the weights of `model`; returns what stood beside the losses.

    Each of `losses` is a function without arguments that returns (loss, anything). With one worker they are differentiated one after
    another; several workers differentiate side by side and .grad is summed in order. Processes that hold parts of the model exchange
    gradients with the last of them; others do not at all here (`rlhf.compute.average_gradients`).
    """
    if workers.count == 1:
        beside = []
        for place, loss in enumerate(losses):
            with contextlib.nullcontext() if sharded(accelerator) and place + 1 == len(losses) else accelerator.no_sync(model):
                value, extra = loss()
                accelerator.backward(value)
            beside.append(extra)
        return beside

    parameters = [p for p in model.parameters() if p.requires_grad]

    def differentiate(loss):
        value, extra = loss()
        return torch.autograd.grad(value, parameters, allow_unused=True), extra

    beside = []
    for gradients, extra in workers.each(differentiate, losses):
        beside.append(extra)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        del gradients, gradient  # before the next ones come
    return beside
