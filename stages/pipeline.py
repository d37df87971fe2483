"""All stages in order; a finished stage is not run again, so the same command goes on where it stopped.

    python -m stages.pipeline --config configs/quickstart.yaml

Reads what `prepare` reads; leaves the whole run folder and says at the end what was found and where the report is. With
pipeline.rounds > 1 (iterated RLHF, as InstructGPT did): each round but the last runs a short PPO in RUN/round_N, and the next `collect`
ranks answers of that policy too; the last reward model learns from all rankings, and the last PPO starts again from SFT.
"""

import re
import sys
import time
from functools import partial
from pathlib import Path

from rlhf.cli import run_stage
from rlhf.compute import wait_for_everyone
from rlhf.config import Config
from rlhf.errors import InputError
from rlhf.memory import give_back
from rlhf.progress import say
from rlhf.prompts import refuse_empty_parts
from rlhf.runs import replace_section
from rlhf.scoring import CallableJudge, CallableScorer, is_function
from stages import collect, compare, ppo, prepare, pretrain, reward, sft

POLICIES = ("pretrained", "sft", "ppo", "ppo_last", "sft_again", "untrained")  # that compare knows by name
ROUND = re.compile(r"round_\d+/ppo")


def main(config: Config) -> None:
    began = time.perf_counter()
    rounds = config.pipeline.rounds
    _check_last_stages(config)
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


def _check_last_stages(config: Config) -> None:
    """InputError for settings of the last stages that can be known to be wrong before the first one has taken its time."""
    for name in config.compare.policies:
        folder = Path(config.run.dir) / name / "model"
        if not (name in POLICIES or compare.BEST_OF.fullmatch(name) or compare.COOLED.fullmatch(name) or ROUND.fullmatch(name) or folder.is_dir()):
            raise InputError(f"compare.policies: found {name!r}, wanted some of {', '.join(POLICIES)}, best_of_N, sft_at_TEMPERATURE")
    if config.ppo.score:
        CallableScorer(config.ppo.score)
    for name in config.ppo.mix:
        if is_function(name):
            CallableScorer(name, "ppo.mix")
    if is_function(config.compare.judge):
        CallableJudge(config.compare.judge)
    if config.compare.judge == "judge" and config.data.judge_fraction == 0 and not (Path(config.run.dir) / "judge").is_dir():
        raise InputError("compare.judge=judge: found data.judge_fraction=0, which makes no judge; wanted a share of the prompts for it, say 0.3")


def _timed(name: str, action) -> None:
    began = time.perf_counter()
    action()
    wait_for_everyone()  # the main process alone writes what the next stage reads
    give_back()
    say(f"pipeline: {name.removeprefix('stages.')} took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
