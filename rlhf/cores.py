"""How many cores a process may use; without torch, which takes seconds to import."""

import os


def threads_per_process(wanted: int) -> int:
    """CPU threads for each process of this machine: `wanted`, or the usable cores shared out."""
    if wanted:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
