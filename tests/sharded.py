"""SFT, reward model and PPO with weights that FSDP2 shards among CPU processes; PPO is stopped after its first checkpoint and goes on.

    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m tests.sharded section.key=value ...

FSDP's settings come from the environment, as `accelerate launch` hands them over. accelerate shards on accelerators alone, so what it
makes of a launch file is said here; from then on everything is its and PyTorch's own.
"""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import stages.ppo
import stages.reward
import stages.sft
from rlhf.config import load_config

plain_init = AcceleratorState.__init__


def init_as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def save_and_stop(*args, **kwargs):
    save_checkpoint(*args, **kwargs)
    raise KeyboardInterrupt


save_checkpoint = stages.ppo.save_checkpoint

if __name__ == "__main__":
    AcceleratorState.__init__ = init_as_on_gpus
    config = load_config("configs/tiny.yaml", sys.argv[1:])
    stages.sft.main(config)
    assert PartialState().distributed_type == DistributedType.FSDP
    stages.reward.main(config)
    stages.ppo.save_checkpoint = save_and_stop
    try:
        stages.ppo.main(config)
    except KeyboardInterrupt:
        print("stopped after a checkpoint")
    stages.ppo.save_checkpoint = save_checkpoint
    stages.ppo.main(config)
