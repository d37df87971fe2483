"""A module run on a GPU that lives in host memory (tests/host_gpu.cpp): torch says 'cuda', the CPU computes.

    python -m tests.host_gpu LIBRARY MODULE ARGUMENTS...        LIBRARY is built where there is none, with g++

It shows that every tensor of a run is on the device it belongs on and that the code for GPUs computes what the code for CPUs does. It knows
nothing of a GPU's kernels, speed or memory, and has one device.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

GB = 1 << 30


def build(library: Path) -> None:
    """Compiles the device; some ten seconds. Raises RuntimeError with what the compiler says."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # not imported: the device has to be there first
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}",
               str(Path(__file__).with_suffix(".cpp")), "-o", str(library), f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def start(library: Path) -> None:
    """Makes the device torch's GPU, in a process that has not imported torch yet."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, and looks for its devices then")
    ctypes.CDLL(str(library))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    import torch
    import torch._dynamo  # reads what torch.cuda consists of, so before it changes
    import torch._inductor.utils  # noqa: F401 (the same)

    state = torch.zeros(16, dtype=torch.uint8)
    for name, answer in {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_lazy_init": None, "set_device": None,
        "is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_name": "host", "mem_get_info": (70 * GB, 80 * GB),
        "get_device_properties": SimpleNamespace(name="host", total_memory=80 * GB, major=9, minor=0, multi_processor_count=1),
        "synchronize": None, "empty_cache": None, "ipc_collect": None, "memory_stats": {}, "memory_allocated": 0, "memory_reserved": 0,
        "max_memory_allocated": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, _always(answer))
    for name, answer in {"get_rng_state": state, "get_rng_state_all": [state], "set_rng_state": None, "set_rng_state_all": None,
                         "manual_seed": None, "manual_seed_all": None}.items():
        setattr(torch.cuda, name, _always(answer))
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name, answer in {"getDevice": 0, "setDevice": None, "exchangeDevice": 0, "maybeExchangeDevice": 0, "isCurrentStreamCapturing": False,
                         "getDeviceCount": 1}.items():
        setattr(torch._C, f"_cuda_{name}", _always(answer))


def _always(answer):
    return lambda *args, **kwargs: answer


if __name__ == "__main__":
    device = Path(sys.argv[1])
    if not device.is_file():
        build(device)
    start(device)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
