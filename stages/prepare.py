"""Stage 0, prepare: raw files, hub ids or the embedded world -> canonical rows, split by prompt.

    python -m stages.prepare --config configs/quickstart.yaml [seed=2]

Reads the files and hub ids of the `data` settings; where there are none, the simulator of `rlhf/world` writes everything.
Leaves RUN/data/{text,demonstrations,preferences,prompts}/{train,eval,test}.jsonl and RUN/data/drops.json (every row that could not be
used, by reason, with file and line). A prompt is on the same side in every file: its side is a hash of its first user turn.
Simplified on purpose: rows that are too long for the model are only known once there is a tokenizer, so later stages drop and count them.
"""

import contextlib
import random
import sys
from collections import Counter
from pathlib import Path

from rlhf import world
from rlhf.cli import run_stage
from rlhf.config import Config
from rlhf.cores import threads_per_process
from rlhf.data import KINDS, SPLITS, Report, prompt_id, split_of, text_id
from rlhf.data.bulk import convert_all
from rlhf.data.reading import files_of, parts_of
from rlhf.errors import InputError
from rlhf.jsonl import json_line, replacing, write_json
from rlhf.progress import say
from rlhf.runs import file_digest, open_stage

TEXT_SHARES = (0.01, 0.0)  # of eval and test: enough for a held-out loss, and no model is compared on text


def main(config: Config) -> None:
    sources = {kind: getattr(config.data, kind) for kind in KINDS}
    stage = open_stage("prepare", config, inputs=_digests(sources))
    if stage.done:
        say(f"prepare: already done in {stage.folder}")
        return
    if not stage.main:
        return
    data = Path(config.run.dir) / "data"
    if config.uses_world:
        counts, drops = _write_world(config, data), []
    else:
        counts, drops = _convert_files(config, _filled_in(sources), data)
    write_json(data / "drops.json", drops)
    for kind, sizes in counts.items():
        say(f"prepare: {kind}: " + ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS))
    stage.finish(rows={kind: dict(sizes) for kind, sizes in counts.items()})


def _write_world(config: Config, data: Path) -> dict[str, Counter]:
    """Everything by the simulator: demonstrations by writers of mixed skill, prompts without answers, text that is mostly right."""
    size, seed = config.world, config.seed
    rng = random.Random(f"{seed} demonstrations")
    prompts = [_world_row(p) for p in world.sample_prompts(size.prompts, "train", seed)]
    prompts += [_world_row(p) for p in world.sample_prompts(size.test_prompts, "test", seed)]
    asked = [_world_row(p) for p in world.sample_prompts(size.demonstrations, "train", seed + 1)]
    demonstrations = [{**row, "completion": world.write_demonstration(row["prompt"][0]["content"], rng, size.flaw_rate)} for row in asked]
    text = [{"text": t, "id": text_id(t)} for t in world.write_text(size.documents, seed, size.text_flaw_rate)]
    side = {"prompts": _world_side, "demonstrations": _world_side, "text": lambda row, config: split_of(row["id"], *TEXT_SHARES)}
    return {kind: _split(rows, data / kind, lambda row, kind=kind: side[kind](row, config))
            for kind, rows in (("text", text), ("demonstrations", demonstrations), ("prompts", prompts))}


def _world_row(prompt: str) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "id": prompt_id(messages), "family": world.family_of(prompt)}


def _world_side(row: dict, config: Config) -> str:
    """The world itself says which prompts are for the test (held-out phrasings, arguments and combinations); eval is taken from its train."""
    if world.split_of(row["prompt"][0]["content"]) == "test":
        return "test"
    return split_of(row["id"], config.data.eval_fraction, 0.0)


def _filled_in(sources: dict[str, list[str]]) -> dict[str, list[str]]:
    """Kinds without a source of their own are taken from another one: prompts and demonstrations from preferences, text from demonstrations."""
    filled = dict(sources)
    filled["demonstrations"] = filled["demonstrations"] or filled["preferences"]
    filled["prompts"] = filled["prompts"] or filled["preferences"] or filled["demonstrations"]
    filled["text"] = filled["text"] or filled["demonstrations"]
    if not filled["demonstrations"]:
        raise InputError("data.prompts is set, but neither data.demonstrations nor data.preferences: SFT has nothing to learn from; set one of them")
    return filled


def _convert_files(config: Config, sources: dict[str, list[str]], data: Path) -> tuple[dict[str, Counter], list[dict]]:
    counts, reports = {kind: Counter() for kind in KINDS if sources[kind]}, {kind: [] for kind in KINDS}
    for names in dict.fromkeys(tuple(sources[kind]) for kind in counts):
        kinds = [kind for kind in counts if tuple(sources[kind]) == names]  # files that several kinds are taken from are read once
        with contextlib.ExitStack() as files:
            open_files = {(kind, split): files.enter_context(replacing(data / kind / f"{split}.jsonl", "wb")) for kind in kinds for split in SPLITS}
            for source in names:
                made = {kind: Report(source, kind) for kind in kinds}
                for kind, split, count, lines in convert_all(source, made, config.data.mapping, _shares(config), config.reward.ties == "half",
                                                      threads_per_process(config.run.threads)):
                    open_files[kind, split].write(lines)
                    counts[kind][split] += count
                for kind, report in made.items():
                    say(f"prepare: {source}: {report.describe()}")
                    reports[kind].append(report.as_json())
        for kind in kinds:
            if not counts[kind]["train"]:
                raise InputError(f"data.{kind}: {', '.join(names)}: no row is left to train on (found {dict(counts[kind])}); "
                                 "give more data or lower data.test_fraction")
    return counts, [report for kind in KINDS for report in reports[kind]]


def _shares(config: Config) -> dict[str, tuple[float, float]]:
    """Shares of eval and test for each kind."""
    return dict.fromkeys(KINDS, (config.data.eval_fraction, config.data.test_fraction)) | {"text": TEXT_SHARES}


def _split(rows, folder: Path, side) -> Counter:
    """Writes rows into train, eval and test below `folder` as they come (memory stays bounded); all three files appear together or not at all."""
    sizes: Counter = Counter()
    with contextlib.ExitStack() as files:
        open_files = {split: files.enter_context(replacing(folder / f"{split}.jsonl")) for split in SPLITS}
        for row in rows:
            split = side(row)
            open_files[split].write(json_line(row))
            sizes[split] += 1
    return sizes


def _digests(sources: dict[str, list[str]]) -> dict[str, str]:
    """Digest of every input file, so that a changed file is noticed; hub ids stand for themselves."""
    names = {name for names in sources.values() for source in names for part in parts_of(source) for name in files_of(part)}
    return {name: file_digest(Path(name)) for name in sorted(names)}


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
