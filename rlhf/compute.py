"""Devices, processes, precision and threads: accelerate owns them, this file asks it for what the settings name."""

import gc
import sys
from datetime import timedelta

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, parse_flag_from_env, set_seed

from rlhf.config import Config
from rlhf.cores import threads_per_process
from rlhf.errors import InputError
from rlhf.quiet import quiet_libraries

PATIENCE = timedelta(hours=12)  # of processes that wait while the main one evaluates or asks a judge; NCCL ends them after ten minutes else
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start(config: Config) -> Accelerator:
    """An accelerator in the run's precision, threads set, every generator seeded alike on all processes.

    Raises InputError for settings that a sharded model cannot have.
    """
    quiet_libraries()
    torch.set_num_threads(threads_per_process(config.run.threads))
    # Its backward pass gives NaN for some masks (pytorch/pytorch#196678), and torch takes it first on new GPUs
    torch.backends.cuda.enable_cudnn_sdp(False)
    # No pass may need the other processes: where memory runs out in one of them, it alone tries again (rlhf/memory.py)
    alone = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision(config.run.precision),
                              kwargs_handlers=[alone, InitProcessGroupKwargs(timeout=PATIENCE)])
    if config.model.attention == "flash_attention_2" and (on_cpu() or accelerator.mixed_precision != "bf16"):
        raise InputError(f"model.attention=flash_attention_2: found {accelerator.device.type} and passes in "
                         f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'}, wanted a GPU and bf16; leave it at auto")
    if sharded(accelerator) and config.model.lora_rank:
        raise InputError(f"model.lora_rank={config.model.lora_rank} with a model sharded among {accelerator.num_processes} processes: found no need "
                         "of both, adapters are few; launch with configs/accelerate/ddp.yaml, or set model.lora_rank=0")
    set_seed(config.seed)
    return accelerator


def on_cpu() -> bool:
    """True where there is no GPU, or accelerate was told to leave it alone."""
    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def precision(wanted: str) -> str:
    """accelerate's name for run.precision: bf16 only where the hardware multiplies it (emulated, it is slower than fp32)."""
    if wanted == "auto":
        if not on_cpu():
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"
    return {"bf16": "bf16", "fp32": "no"}[wanted]


def describe(accelerator: Accelerator) -> str:
    """One phrase for the log: processes, device, threads, precision."""
    where = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} on {accelerator.device.type}"
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)} each" if accelerator.device.type == "cpu" else ""
    return f"{where}{threads}, {'bf16 passes over fp32 weights' if accelerator.mixed_precision == 'bf16' else 'fp32'}"


def wait_for_everyone() -> None:
    """Returns when every process has come here; at once where there is one."""
    PartialState(cpu=on_cpu(), timeout=PATIENCE).wait_for_everyone()


def leave_processes() -> None:
    """The last thing a process does with the others: with connections left to Python's end, some that had done their work were aborted there."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # without it, sharded models among what was lost track of, two of eight were aborted still
        torch.distributed.destroy_process_group()


def sharded(accelerator: Accelerator) -> bool:
    """True where each process holds a part of the model (FSDP, DeepSpeed), so that every pass needs all of them."""
    return accelerator.num_processes > 1 and accelerator.distributed_type in SHARDED


def average_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Puts the mean over processes in the place of every gradient; nothing where the model is sharded, whose passes have done so.

    DDP's own exchange runs inside the last backward pass, where a process whose memory runs out cannot try again.
    """
    if accelerator.num_processes == 1 or sharded(accelerator):
        return
    for p in model.parameters():
        if p.requires_grad and p.grad is None:  # not part of this process's graph; the others wait for it
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    for exchange in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        exchange.wait()
    for gradient in gradients:
        gradient /= accelerator.num_processes


def sum_over_processes(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="sum")


def max_over_processes(accelerator: Accelerator, number: int) -> int:
    """Largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def gather_rows(accelerator: Accelerator, rows: list) -> list:
    """The processes' lists joined in order of rank, on every process."""
    if accelerator.num_processes == 1:
        return rows
    parts: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def share(accelerator: Accelerator, rows: list) -> list:
    """This process's rows of a list that all processes hold: contiguous, in order of rank, so that `gather_rows` restores the list."""
    count, index = accelerator.num_processes, accelerator.process_index
    return rows[len(rows) * index // count : len(rows) * (index + 1) // count]


def my_share(accelerator: Accelerator, rows):
    """This process's rows of a list or tensor that all processes hold; raises InputError, on all of them, where there are too few for each."""
    if len(rows) < accelerator.num_processes:
        raise InputError(f"{len(rows)} rows of a batch cannot be shared among {accelerator.num_processes} processes; start fewer of them or make "
                         "the batch larger (ppo.batch_size / ppo.minibatches, ppo.eval_prompts, ...)")
    return share(accelerator, rows)


def synchronize(device: torch.device) -> None:
    """Returns when a device has done what it was asked; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory_mb() -> int:
    """Largest memory of this process so far, MiB: of its tensors on a GPU, else all that is resident."""
    if not on_cpu():
        return torch.cuda.max_memory_allocated() // 1024**2
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024**2 if sys.platform == "darwin" else 1024)  # macOS counts bytes
