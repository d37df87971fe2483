"""`rlhf bench --sweep DIR`: the PPO step over batch sizes, completion lengths and model sizes, each point in a process of its own, so that its
peak memory is its own. Leaves speed.json, speed.md and a chart an axis.

Batch sizes are swept with the run's own models. Completion lengths and model sizes need models whose answers never end by themselves: fresh
weights, of the run's shape and of the named sizes, with the run's tokenizer and prompts.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf.charts import Series, line_chart, standalone
from rlhf.config import Config
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.jsonl import replacing, write_json
from rlhf.models import SIZES, load_encoder, load_reward_model, longest_row, new_gpt, save_model, untrained_policy
from rlhf.progress import Progress

BATCHES, LENGTHS, MODELS = (16, 32, 64, 128, 256), (16, 32, 64, 128), ("nano", "micro", "mini")
AXES = {  # name: (title, what a point varies, x of a point, its label)
    "batch": ("PPO step over batch sizes", "ppo.batch_size", "tokens", "real tokens in a rollout"),
    "length": ("PPO step over completion lengths, fresh weights", "data.max_completion_tokens", "tokens", "real tokens in a rollout"),
    "size": ("PPO step over model sizes, fresh weights", "model.size", "parameters", "million parameters of policy and value model"),
}
LINES = {"step": ("whole step", "ppo"), "update": ("update", "sft"), "sample": ("sample", "extra-1")}


def sweep(run: Path, config: Config, overrides: list[str], steps: int, folder: Path) -> None:
    """Times every point and writes the folder. Raises InputError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--sweep {folder}: cannot be written ({error.strerror}); name another folder") from None
    with tempfile.TemporaryDirectory() as scratch:
        points = [*_points(run, config, Path(scratch))]
        with Progress("bench", len(points)) as bar:
            for number, point in enumerate(points, 1):
                point |= _timed(point.pop("run"), [*overrides, *point.pop("settings")], steps)
                bar.update(number, tokens_per_second=int(point["tokens_per_second"]))
    write_json(folder / "speed.json", points)
    for axis, (title, *_) in AXES.items():
        with replacing(folder / f"{axis}.svg") as file:
            file.write(standalone(_chart(axis, title, [p for p in points if p["axis"] == axis])))
    with replacing(folder / "speed.md") as file:
        file.write(as_markdown(points))
    print(f"bench: {folder / 'speed.md'} and {len(AXES)} charts beside it")


def _points(run: Path, config: Config, scratch: Path):
    """Each point's axis, value, run folder and settings; models with fresh weights are made in `scratch` as they come up."""
    sft, trust = str(run / "sft" / "model"), config.model.trust_remote_code
    encoder = load_encoder(sft, trust)
    for batch in BATCHES:
        yield {"axis": "batch", "value": batch, "run": run, "settings": [f"ppo.batch_size={batch}"]}
    fresh = untrained_policy(sft, encoder, "eager", config.seed, trust)
    same_shape, room = _fresh_run(run, fresh, encoder, scratch / "same", trust), longest_row(fresh)
    for length in LENGTHS:
        if room is None or config.data.max_prompt_tokens + length <= room:
            yield {"axis": "length", "value": length, "run": same_shape, "settings": [f"data.max_completion_tokens={length}"]}
    for size in MODELS:
        layers, width, _ = SIZES[size]
        gpt = new_gpt(size, encoder, config.data.max_prompt_tokens + config.data.max_completion_tokens, "eager")
        yield {"axis": "size", "value": f"{size} ({layers} x {width})", "run": _fresh_run(run, gpt, encoder, scratch / size, trust), "settings": []}


def _fresh_run(run: Path, policy, encoder: Encoder, folder: Path, trust_remote_code: bool) -> Path:
    """A run folder with RUN's data and settings whose SFT and reward model are `policy` with weights nobody trained."""
    for stage in ("prepare", "sft", "reward", "ppo"):
        (folder / stage).mkdir(parents=True)
        for name in ("config.yaml", "DONE"):
            if (run / stage / name).is_file():
                (folder / stage / name).write_bytes((run / stage / name).read_bytes())
    (folder / "data").symlink_to((run / "data").resolve())
    save_model(policy, encoder, folder / "sft" / "model")
    save_model(load_reward_model(str(folder / "sft" / "model"), encoder, "eager", trust_remote_code), encoder, folder / "reward" / "model")
    return folder


def _timed(run: Path, settings: list[str], steps: int) -> dict:
    """What `rlhf bench --json` says of a run. Raises InputError with its message when it ends otherwise than well."""
    command = [sys.executable, "-m", "rlhf", "bench", "--run", str(run), "--json", "--steps", str(steps), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise InputError(f"--sweep with {' '.join(settings) or 'no settings'}: {said[-1].removeprefix('error: ')}")
    figures = json.loads(done.stdout)
    return {name: figures[name] for name in ("parameters", "tokens", "length_mean", "seconds", "tokens_per_second", "update_product_share",
                                             "peak_memory_mb", "sampling")}


def _chart(axis: str, title: str, points: list[dict]) -> str:
    _, _, x, label = AXES[axis]
    unit = 1e6 if x == "parameters" else 1
    lines = [Series(name, [p[x] / unit for p in points], [p["seconds"][phase] for p in points], slot, marked=True)
             for phase, (name, slot) in LINES.items()]
    return line_chart(axis, f"{title}: seconds", lines, xlabel=label, ylabel="seconds")


def as_markdown(points: list[dict]) -> str:
    """The table, and how far the step is from linear in real tokens over batch sizes."""
    rows = ["| what varies | value | real tokens | seconds a step | sample | score | forward | update | tokens/s | of the product rate | peak MiB | "
            "sampling against generate |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for p in points:
        seconds = [f"{p['seconds'][phase]:.2f}" for phase in ("step", "sample", "score", "forward", "update")]
        rows.append(f"| {AXES[p['axis']][1]} | {p['value']} | {p['tokens']:,.0f} | {' | '.join(seconds)} | {p['tokens_per_second']:,.0f} | "
                    f"{p['update_product_share']:.2f} | {p['peak_memory_mb']:,} | {p['sampling']['ratio']:.1f} |")
    fixed, per_token, off = linear([(p["tokens"], p["seconds"]["step"]) for p in points if p["axis"] == "batch"])
    rows += ["", f"Over batch sizes a step takes {fixed:.2f} s + {1000 * per_token:.3f} s per 1,000 real tokens; the point farthest from that line "
             f"is {off:.0%} off."]
    return "\n".join(rows) + "\n"


def linear(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(intercept, slope, largest relative distance of a point from the line) of the least-squares line through (x, y)."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope, max(abs(y / (intercept + slope * x) - 1) for x, y in points)
