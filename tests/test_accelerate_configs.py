"""The launch files in configs/accelerate: each parses with accelerate's own loader and launcher, and means what its name says.

The CPU one is launched for real by the tests of the stages; the GPU ones are parsed here, since the machines these tests run on have none.
"""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parent.parent / "configs" / "accelerate"
MEANING = {  # file: (kind, processes)
    "cpu-2.yaml": (DistributedType.MULTI_GPU, 2),  # accelerate's name for "torchrun"; use_cpu makes it gloo
    "gpu-1.yaml": (DistributedType.NO, 1),
    "ddp.yaml": (DistributedType.MULTI_GPU, 2),
    "fsdp2.yaml": (DistributedType.FSDP, 2),
    "deepspeed-zero2.yaml": (DistributedType.DEEPSPEED, 2),
    "deepspeed-zero3.yaml": (DistributedType.DEEPSPEED, 2),
}


def _launch_arguments(name: str):
    """What `accelerate launch --config_file NAME -m stages.ppo` makes of the file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "-m", "stages.ppo"])
    return _validate_launch_command(arguments)[0]


def test_every_file_is_described_here():
    assert sorted(p.name for p in FOLDER.glob("*.yaml")) == sorted(MEANING)


@pytest.mark.parametrize("name", MEANING)
def test_accelerate_loads_the_file(name):
    config = load_config_from_file(str(FOLDER / name))
    assert (config.distributed_type, config.num_processes) == MEANING[name]
    assert config.use_cpu == (name == "cpu-2.yaml")
    assert config.mixed_precision is None, "precision is run.precision's business"


@pytest.mark.parametrize("name", MEANING)
def test_the_launcher_knows_every_key(name):
    """The launcher takes unknown nested keys in silence, so a misspelt one would do nothing."""
    known = vars(launch_command_parser().parse_args(["x"]))
    for section, value in yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")).items():
        if isinstance(value, dict):
            assert [key for key in value if key not in known] == [], section


def test_the_launcher_picks_the_right_way_to_start():
    chosen = {name: (a.multi_gpu, a.use_fsdp, a.use_deepspeed, a.use_cpu) for name in MEANING for a in [_launch_arguments(name)]}
    assert chosen == {
        "cpu-2.yaml": (True, False, False, True), "gpu-1.yaml": (False, False, False, False), "ddp.yaml": (True, False, False, False),
        "fsdp2.yaml": (False, True, False, False), "deepspeed-zero2.yaml": (False, False, True, False),
        "deepspeed-zero3.yaml": (False, False, True, False)}
    assert _launch_arguments("deepspeed-zero2.yaml").zero_stage == 2
    assert _launch_arguments("deepspeed-zero3.yaml").zero_stage == 3


def test_fsdp_file_makes_a_version_2_plugin(monkeypatch):
    """The launcher hands FSDP's settings to the processes as environment variables, from which the plugin is made."""
    for name, value in prepare_multi_gpu_env(_launch_arguments("fsdp2.yaml")).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
