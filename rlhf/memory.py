"""When a microbatch does not fit into memory: it is halved and tried again with the same mathematics (CANON P4). What is free goes back."""

import ctypes
import gc
import sys
from collections.abc import Callable

import torch

from rlhf.errors import TrainingStopped, first_line
from rlhf.progress import say

WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory", "bad_alloc",  # CUDA and the CPU allocator
         "could not create a primitive", "could not execute a primitive", "could not create a memory object")  # oneDNN gives no reason


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which torch says that memory ran out, on GPUs and CPUs."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and any(w in str(error) for w in WORDS)


def give_back() -> None:
    """Returns all that is no longer used to the system: a stage in one process with others would add to what they left."""
    gc.collect()
    trim()


def trim() -> None:
    """Returns freed memory to the system, which glibc keeps otherwise in pieces that the next phase's tensors may not fit into."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class Microbatch:
    """How much a microbatch may hold, in `unit`s; once halved it stays so for the rest of the run. `shorter`: settings that make a row shorter."""

    def __init__(self, size: int, setting: str = "ppo.microbatch_tokens", unit: str = "tokens",
                 shorter: tuple[str, ...] = ("data.max_prompt_tokens", "data.max_completion_tokens")):
        self.size, self.setting, self.unit, self.shorter = size, setting, unit, shorter

    def attempt(self, function: Callable[[int], object], least: int, sharded: bool = False):
        """function(size), tried anew with half the size while memory runs out, down to `least` units: one row.

        `function` must undo what a failed try left behind, and exchange nothing with other processes. Raises TrainingStopped when a single row
        does not fit, and for a model that is `sharded` among processes, where one that tries again would leave the others waiting.
        """
        while True:
            try:
                return function(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.size <= least or sharded:
                    raise TrainingStopped(f"memory ran out in a microbatch of at most {self.size} {self.unit} (one row: at most {least}): "
                                          f"{first_line(error)}. The last checkpoint is whole. Lower "
                                          f"{', '.join((self.setting, *self.shorter[:-1]))} or {self.shorter[-1]}") from None
            # Outside of the except block, where the failed try's tensors are no longer held by its traceback
            give_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.size = max(least, self.size // 2)
            say(f"memory ran out: microbatches have at most {self.size} {self.unit} from here on, with the same result ({self.setting})")
