"""All stages in order; a finished stage is not run again, so the same command goes on where it stopped.

    python -m stages.pipeline --config configs/quickstart.yaml

Reads what `prepare` reads; leaves the whole run folder and says at the end what was found and where the report is. With
pipeline.rounds > 1 (iterated RLHF, as InstructGPT did): each round but the last runs a short PPO in RUN/round_N, and the next `collect`
ranks answers of that policy too; the last reward model learns from all rankings, and the last PPO starts again from SFT.
"""

import sys
import time
from functools import partial
from pathlib import Path

from rlhf.cli import run_stage
from rlhf.compute import wait_for_everyone
from rlhf.config import Config, replace_section
from rlhf.contents import is_function
from rlhf.memory import give_back
from rlhf.models import load_encoder
from rlhf.progress import say
from rlhf.prompts import refuse_empty_parts
from rlhf.scoring import CallableScorer
from stages import collect, compare, ppo, prepare, pretrain, reward, sft


def main(config: Config) -> None:
    began = time.perf_counter()
    rounds = config.pipeline.rounds
    _check_ahead(config)
    _timed("prepare", partial(prepare.main, config))
    refuse_empty_parts(config.run.dir)
    for stage in (pretrain, sft):
        _timed(stage.__name__, lambda stage=stage: stage.main(config))
    for number in range(1, rounds):
        within = f"round_{number}"
        early = replace_section(config, "ppo", rollouts=config.pipeline.early_rollouts)
        _timed(f"round {number} collect", partial(collect.main, config, number))
        _timed(f"round {number} reward", partial(reward.main, config, within))
        _timed(f"round {number} ppo", partial(ppo.main, early, within))
    for stage in (collect, reward, ppo, compare):
        _timed(stage.__name__, lambda stage=stage: stage.main(config))
    say(f"pipeline: {time.perf_counter() - began:.0f} s in all")


def _check_ahead(config: Config) -> None:
    """InputError for settings of later stages that can be known to be wrong before the first one has taken its time."""
    for stage, source in (("sft", config.model.init), ("reward", None if config.reward.init == "sft" else config.reward.init)):
        if source and not (Path(config.run.dir) / stage / "DONE").is_file():  # a finished stage needs the model no more
            load_encoder(source, config.model.trust_remote_code)
    if config.ppo.score:
        CallableScorer(config.ppo.score)
    for name in config.ppo.mix:
        if is_function(name):
            CallableScorer(name, "ppo.mix")
    compare.check_settings(config)


def _timed(name: str, action) -> None:
    began = time.perf_counter()
    action()
    wait_for_everyone()  # the main process alone writes what the next stage reads
    give_back()
    say(f"pipeline: {name.removeprefix('stages.')} took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
