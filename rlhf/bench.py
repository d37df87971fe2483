"""How fast a PPO step of a run is on this machine, where its time goes, and how it compares with TRL 1.12 and with `generate`.

    rlhf bench --run runs/quickstart
    rlhf bench --run runs/quickstart --peer trl-1.12 --json
    rlhf bench --run runs/quickstart --sweep speed

Takes RUN's prompts, SFT model and reward model, and the settings of its ppo stage; settings may be given as section.key=value. No file
of RUN changes. For --peer, TRL 1.12 (the last with PPO) lies in a folder of its own:

    pip install --no-deps --target trl-1.12 trl==1.12.0

Both sides then do the same work: weights, prompts, batch, epochs, minibatches, learning rate, KL price, temperature, threads, precision; their
steps alternate, the first of each is left out, and medians are compared. With model.lora_rank only our side trains adapters. TRL's value model
starts as the whole reward model, ours on its trunk (rlhf/value.py).
--sweep repeats this (without a peer) over batch sizes, completion lengths and sizes of the small GPT, and leaves charts and a table in a folder.
Of the stage's work, PPO-ptx, the moving average, warm-up rollouts, evaluations and files are left out.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rlhf.cli import guarded
from rlhf.compute import describe, peak_memory_mb, start, synchronize
from rlhf.config import Config, load_config, replace_section
from rlhf.errors import InputError
from rlhf.learner import Learner
from rlhf.masking import left_pad, left_pad_mask
from rlhf.models import as_written, load_encoder, parameter_count
from rlhf.passes import make_rows, pass_cost, policy_pass, tight_groups
from rlhf.paths import PACKAGE
from rlhf.progress import say
from rlhf.prompts import Prompt, load_prompts, prompts_of_step
from rlhf.runs import parent_digests
from rlhf.sampling import draw_uniforms, sample
from rlhf.sharding import whole
from rlhf.terminal import Help, whole_number

PHASES = ("sample", "score", "forward", "update")
PEER = "1.12."  # TRL's last minor release with PPO
PRODUCT_SIZE, PRODUCTS = 2048, 4  # of the product rate: square matrices, large enough for the hardware's best
ROUNDS = 3  # of sampling and of single passes, after one that is left out


def main(argv: list[str] | None = None) -> int:
    """The command `rlhf bench`; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    return guarded(lambda: _bench(arguments))


def parser() -> argparse.ArgumentParser:
    """The options of `rlhf bench`."""
    options = argparse.ArgumentParser(prog="rlhf bench", description=__doc__, formatter_class=Help)
    options.add_argument("--run", default="runs/quickstart", help="run folder whose sft and reward stages are finished (default: runs/quickstart)")
    options.add_argument("--peer", metavar="DIR", help="folder that holds trl 1.12: its PPO takes the same steps in turn with ours")
    options.add_argument("--steps", type=whole_number, default=5, metavar="N", help="timed steps, after one that is left out (default: 5)")
    options.add_argument("--json", action="store_true", help="one JSON object on standard output, and nothing else")
    options.add_argument("--sweep", metavar="DIR", help="folder for charts and a table over batch size, completion length and model size")
    options.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the run's")
    return options


def _bench(arguments) -> None:
    run = Path(arguments.run)
    config = run_config(run, arguments.overrides)
    if arguments.sweep:
        from rlhf.bench_sweep import sweep  # draws with matplotlib, which takes a second to import

        sweep(run, config, arguments.overrides, arguments.steps, Path(arguments.sweep))
        return
    peer_folder = None if arguments.peer is None else checked_peer(Path(arguments.peer), config)
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        figures = measure(config, arguments.steps, peer_folder)
    print(json.dumps(figures) if arguments.json else as_text(figures))


def run_config(run: Path, overrides: list[str]) -> Config:
    """Settings of a run's ppo stage (of its reward or SFT stage before there is one) with overrides. Raises InputError for a folder that is no
    run or whose earlier stages are not finished."""
    found = [path for stage in ("ppo", "reward", "sft") if (path := run / stage / "config.yaml").is_file()]
    if not found:
        raise InputError(f"--run {run}: found no run there (no sft/config.yaml); wanted a run folder; `rlhf pipeline run.dir={run}` makes one")
    config = replace_section(load_config(str(found[0]), overrides), "run", dir=str(run))
    parent_digests("bench", run, ("prepare", "sft") + (() if config.ppo.score else ("reward",)))
    return replace_section(config, "ppo", warmup_rollouts=0, target_kl=None, ptx_coef=0.0)  # every step does the whole work


def checked_peer(folder: Path, config: Config) -> Path:
    """`folder`, if it holds TRL 1.12 with its PPO and the run is one that TRL can train too. Raises InputError."""
    found = [d.version for d in importlib.metadata.distributions(name="trl", path=[str(folder)])]
    if not (found and found[0].startswith(PEER) and (folder / "trl" / "experimental" / "ppo" / "__init__.py").is_file()):
        raise InputError(f"--peer {folder}: found {'trl ' + found[0] if found else 'no trl'} there, wanted trl {PEER}* with its PPO; "
                         f"`pip install --no-deps --target {folder} trl==1.12.0` puts it there")
    if config.ppo.score or config.ppo.mix or config.reward.members > 1:
        raise InputError("--peer: TRL scores with one reward model; wanted a run without ppo.score and ppo.mix, and with reward.members=1")
    return folder


def measure(config: Config, steps: int, peer_folder: Path | None = None) -> dict:
    """Times `steps` PPO steps after one that is left out, in turn with the peer's if there is one, then sampling alone; the figures for --json."""
    with Peer(peer_folder) if peer_folder else contextlib.nullcontext() as peer:
        accelerator = start(config)
        encoder = load_encoder(str(Path(config.run.dir) / "sft" / "model"), config.model.trust_remote_code)
        prompts = load_prompts(config.run.dir, "train", encoder, config.data.max_prompt_tokens)
        batches = [prompts_of_step(prompts, step, config.ppo.batch_size, config.seed) for step in range(steps + 1)]
        learner = Learner(config, accelerator, encoder)
        if peer is not None:
            peer.begin(peer_work(config, accelerator, batches))
        ours, peers = [], []
        for step, rows in enumerate(batches):
            peers += [peer.step()] if peer is not None else []
            ours.append(timed_step(learner, rows, step))
            say(f"bench: step {step} of {steps}: {ours[-1]['seconds']:.2f} s" + (f", TRL's {peers[-1]['seconds']:.2f} s" if peers else "")
                + ("" if step else " (left out)"))
        memory = peak_memory_mb()
    figures = summary(learner, ours[1:]) | {"peak_memory_mb": memory, "sampling": sampling(learner, batches[-1]),
                                            "passes": passes(learner, batches[-1])}
    return figures | (against(peers[1:], figures) if peers else {})


def timed_step(learner: Learner, rows: list[Prompt], step: int) -> dict:
    """One PPO step: its seconds, those of its phases, its real tokens and mean score; and the rate of products right after it."""
    learner.clock.take()
    learner.model.train()
    began, cpu_began = time.perf_counter(), time.process_time()
    rollout = learner.roll(rows, learner.config.ppo.kl_coef, 1, step)
    figures = rollout.statistics(learner.encoder) | learner.learn(rollout, step)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": rollout.tokens, "score_mean": figures["score_mean"],
            "length_mean": figures["length_mean"], "product_rate": product_rate(learner.accelerator), **learner.clock.take()}


def product_rate(accelerator) -> float:
    """FLOP/s of large matrix products in the precision of the passes."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=accelerator.device).to(dtype) for _ in range(2))
    synchronize(accelerator.device)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        a @ b
    synchronize(accelerator.device)
    return PRODUCTS * 2 * PRODUCT_SIZE**3 / (time.perf_counter() - began)


def summary(learner: Learner, steps: list[dict]) -> dict:
    """Medians over the timed steps, and the settings that they depend on."""
    settings = learner.config.ppo

    def middle(name):
        return statistics.median(step[name] for step in steps)

    seconds = {phase: middle(f"seconds_{phase}") for phase in PHASES} | {"step": middle("seconds")}
    seconds["other"] = statistics.median(s["seconds"] - sum(s[f"seconds_{p}"] for p in PHASES) for s in steps)
    parameters, rate = parameter_count(learner.model), middle("product_rate")
    # Forward and backward take 6 operations a weight and token (2 + 4); adapters need no gradient of the weights under them
    operations = (4 if learner.config.model.lora_rank else 6) * parameters * statistics.median(s["tokens"] * settings.epochs for s in steps)
    return {
        "run": learner.config.run.dir, "where": describe(learner.accelerator), "parameters": parameters, "batch_size": settings.batch_size,
        "minibatches": settings.minibatches, "epochs": settings.epochs, "max_completion_tokens": learner.config.data.max_completion_tokens,
        "lora_rank": learner.config.model.lora_rank, "seconds": seconds, "steps": [s["seconds"] for s in steps],
        "cpu_seconds": middle("cpu_seconds"), "tokens": middle("tokens"),
        "tokens_per_second": statistics.median(s["tokens"] / s["seconds"] for s in steps), "length_mean": middle("length_mean"),
        "score_means": [s["score_mean"] for s in steps], "product_rate": rate, "update_rate": operations / seconds["update"],
        "update_product_share": operations / seconds["update"] / rate}


def sampling(learner: Learner, rows: list[Prompt]) -> dict:
    """Tokens that count (with EOS, without what follows it) a second, of our sampler and of `generate` in turn on the same prompts."""
    ways, rates = (_sampled, _generated), {_sampled: [], _generated: []}
    for number in range(ROUNDS + 1):
        for way in ways:
            began = time.perf_counter()
            with learner.accelerator.autocast():
                tokens = sum(map(len, way(learner, [p.ids for p in rows], number)))
            rates[way].append(tokens / (time.perf_counter() - began))
    ours, generate = (statistics.median(rates[way][1:]) for way in ways)
    return {"tokens_per_second": ours, "generate_tokens_per_second": generate, "ratio": ours / generate}


def passes(learner: Learner, rows: list[Prompt]) -> dict[str, float]:
    """Seconds of each pass without gradients over one rollout: what the phase `forward` does for every microbatch, here one after another.

    `old`: log-probabilities and entropies of the policy, `reference`: of the SFT model, `value`: values (part of `old` where the trunk is shared).
    """
    model, temperature = learner.accelerator.unwrap_model(learner.model), learner.config.ppo.temperature
    prompts = [p.ids for p in rows]
    with learner.accelerator.autocast():
        completions = _sampled(learner, prompts, 0)
    groups = tight_groups([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], learner.microbatch.size, learner.workers.count,
                          pass_cost(model))
    batches = [make_rows([prompts[i] for i in group], [completions[i] for i in group], learner.encoder.pad_id, learner.accelerator.device)
               for group in groups]
    ways = {"old": lambda batch: policy_pass(model.policy, batch, temperature, entropies=True), "reference": learner.ref_logprobs}
    if model.value_model.trunk is not None:
        ways["value"] = model.value_model

    def seconds(way) -> float:
        def without_gradients(batch):  # of the thread that runs it
            with torch.no_grad(), learner.accelerator.autocast():
                way(batch)

        synchronize(learner.accelerator.device)
        began = time.perf_counter()
        learner.workers.map(without_gradients, batches)
        synchronize(learner.accelerator.device)
        return time.perf_counter() - began

    with whole(learner.model):
        rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(ROUNDS + 1)]
    return {name: statistics.median(found[name] for found in rounds[1:]) for name in ways}


def _sampled(learner: Learner, prompts: list[list[int]], number: int) -> list[list[int]]:
    uniforms_BC = draw_uniforms(len(prompts), learner.config.data.max_completion_tokens, learner.config.seed, 2, number)
    return sample(learner.policy, prompts, uniforms_BC, learner.encoder, learner.config.ppo.temperature, len(prompts),
                  learner.workers)


@torch.inference_mode()
def _generated(learner: Learner, prompts: list[list[int]], number: int) -> list[list[int]]:
    encoder, device = learner.encoder, learner.accelerator.device
    with as_written():  # as in our sampler: a past that grows would be compiled again and again
        ids = learner.policy.generate(
            input_ids=left_pad(prompts, encoder.pad_id).to(device), attention_mask=left_pad_mask([len(p) for p in prompts]).long().to(device),
            do_sample=True, temperature=learner.config.ppo.temperature, top_k=0, top_p=1.0, pad_token_id=encoder.pad_id,
            max_new_tokens=learner.config.data.max_completion_tokens, eos_token_id=encoder.eos_id)
    return [encoder.until_end(row) for row in ids[:, max(map(len, prompts)):].tolist()]


class Peer:
    """TRL's PPO in a process of its own, which takes a step when asked and sleeps meanwhile (rlhf/bench_peer.py)."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, tempfile.TemporaryFile("w+")
        path = os.pathsep.join([str(folder.resolve()), str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen([sys.executable, "-m", "rlhf.bench_peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
                                        text=True, env={**os.environ, "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def begin(self, work: dict) -> None:
        """Sends what its steps are to be made of."""
        self._send(json.dumps(work))

    def step(self) -> dict:
        """One step's {"seconds", "cpu_seconds", "score_mean", "peak_memory_mb"}. Raises InputError when the peer has ended."""
        self._send("step")
        return json.loads(self.process.stdout.readline() or self._ended())

    def _send(self, line: str) -> None:
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._ended()

    def _ended(self):
        self.process.wait()
        self.said.seek(0)
        lines = self.said.read().strip().splitlines() or ["it said nothing"]
        raise InputError(f"--peer {self.folder}: TRL's PPO ended with exit code {self.process.returncode}: {lines[-1]}; wanted trl 1.12.0 beside a "
                         "transformers release that it works with (measured with 5.23)")


def peer_work(config: Config, accelerator, batches: list[list[Prompt]]) -> dict:
    """What the peer needs to take the same steps; `settings` under TRL's names."""
    run, settings = Path(config.run.dir).resolve(), config.ppo
    return {
        "policy": str(run / "sft" / "model"), "reward": str(run / "reward" / "model"), "prompts": [p.ids for rows in batches for p in rows],
        "batch_size": settings.batch_size, "threads": torch.get_num_threads(), "bf16": accelerator.mixed_precision == "bf16", "seed": config.seed,
        "settings": {
            "num_ppo_epochs": settings.epochs, "num_mini_batches": settings.minibatches, "learning_rate": settings.lr, "kl_coef": settings.kl_coef,
            "temperature": settings.temperature, "response_length": config.data.max_completion_tokens, "gamma": settings.gamma,
            "lam": settings.lam, "cliprange": settings.clip, "cliprange_value": settings.value_clip, "vf_coef": settings.value_coef,
            "whiten_rewards": settings.whiten_rewards, "missing_eos_penalty": abs(settings.missing_eos_score)}}


def against(peers: list[dict], ours: dict) -> dict:
    """The peer's figures, and how many of our steps fit into one of its, by the clock and by the CPU seconds both took (which hardly depend on
    what else the machine does)."""
    seconds, cpu_seconds = (statistics.median(p[name] for p in peers) for name in ("seconds", "cpu_seconds"))
    return {"ppo_step_ratio": seconds / ours["seconds"]["step"], "ppo_step_cpu_ratio": cpu_seconds / ours["cpu_seconds"],
            "peer": {"name": "trl 1.12", "seconds": seconds, "steps": [p["seconds"] for p in peers], "cpu_seconds": cpu_seconds,
                     "score_means": [p["score_mean"] for p in peers], "peak_memory_mb": peers[-1]["peak_memory_mb"]}}


def as_text(figures: dict) -> str:
    """The figures as a table for people."""
    seconds, tokens = figures["seconds"], figures["tokens"]
    names = {"sample": "sample", "score": "score", "forward": "old, reference, values", "update": "update", "other": "other", "step": "whole step"}
    lines = [f"{figures['run']}: {figures['batch_size']} completions of at most {figures['max_completion_tokens']} tokens (mean "
             f"{figures['length_mean']:.1f}), {figures['epochs']} epochs x {figures['minibatches']} minibatches, "
             f"{figures['parameters'] / 1e6:.1f}M parameters{', LoRA rank ' + str(figures['lora_rank']) if figures['lora_rank'] else ''}",
             f"{figures['where']}; medians of {len(figures['steps'])} steps after one that is left out", "",
             f"{'phase':<24}{'seconds':>10}{'share':>8}{'tokens/s':>12}"]
    lines += [f"{label:<24}{seconds[name]:>10.3f}{seconds[name] / seconds['step']:>8.0%}{tokens / seconds[name]:>12,.0f}"
              for name, label in names.items()]
    alone = figures["sampling"]
    single = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in figures["passes"].items())
    lines += ["", f"old, reference and values one after another: {single}",
              f"update: {figures['update_rate'] / 1e12:.2f} TFLOP/s, {figures['update_product_share']:.2f} of what matrix products reach here "
              f"({figures['product_rate'] / 1e12:.2f})",
              f"sampling alone: {alone['tokens_per_second']:,.0f} tokens that count a second, {alone['ratio']:.1f} times transformers' generate "
              f"({alone['generate_tokens_per_second']:,.0f})",
              f"peak memory: {figures['peak_memory_mb']:,} MiB"]
    if "peer" in figures:
        peer = figures["peer"]
        lines += [f"{peer['name']}: {peer['seconds']:.2f} s a step, {figures['ppo_step_ratio']:.1f} times ours (by CPU seconds "
                  f"{figures['ppo_step_cpu_ratio']:.1f}); peak memory {peer['peak_memory_mb']:,} MiB"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
