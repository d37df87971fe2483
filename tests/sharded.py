"""SFT, reward model and PPO with weights that FSDP2 shards among CPU processes; PPO is stopped after its first checkpoint and goes on.

    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m tests.sharded section.key=value ...

FSDP's settings come from the environment, as `accelerate launch` hands them over. accelerate shards on accelerators alone, so what it
makes of a launch file is said here; from then on everything is its and PyTorch's own.
"""

import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import stages.ppo
import stages.reward
import stages.sft
from rlhf.compute import leave_processes, start
from rlhf.config import load_config
from rlhf.learner import Learner
from rlhf.sharding import full_weights, whole
from tests.helpers import nano, tiny_encoder

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


def full_weights_are_fp32_where_passes_are_bf16(config) -> None:
    accelerator, policy = start(config), nano(tiny_encoder())
    accelerator.state.fsdp_plugin.set_mixed_precision("bf16", override=True)
    trained = {name: p.detach().clone() for name, p in policy.named_parameters(remove_duplicate=False)}
    model, _ = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))
    for _ in range(2):
        with whole(model):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        saved = full_weights(model)
        assert saved.keys() == trained.keys() and all(torch.equal(saved[name], weights) for name, weights in trained.items())
    assert full_weights(model, keep=False) == {}


def roll_and_remember(learner, rows, kl_coef, *seeds):
    if seeds[0] == 1:  # to learn from; evaluations have another number
        rolled.append(seeds)
    return roll(learner, rows, kl_coef, *seeds)


save_checkpoint, roll, rolled = stages.ppo.save_checkpoint, Learner.roll, []

if __name__ == "__main__":
    AcceleratorState.__init__ = init_as_on_gpus
    config = load_config("configs/tiny.yaml", sys.argv[1:])
    stages.sft.main(config)
    assert PartialState().distributed_type == DistributedType.FSDP
    stages.reward.main(config)
    stages.ppo.save_checkpoint, Learner.roll = save_and_stop, roll_and_remember
    try:
        stages.ppo.main(config)
    except KeyboardInterrupt:
        print("stopped after a checkpoint")
    stages.ppo.save_checkpoint = save_checkpoint
    stages.ppo.main(config)
    assert len(rolled) == len(set(rolled)) == config.ppo.rollouts, "the stage goes on after its checkpoint, and does not start over"
    full_weights_are_fp32_where_passes_are_bf16(config)
    leave_processes()
