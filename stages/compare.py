"""Stage 4, compare: the same held-out prompts to every policy, judged, with intervals; ends in a report that can say "no difference".

    python -m stages.compare --config configs/quickstart.yaml [compare.prompts=200 ...]

Reads RUN/data/prompts/test.jsonl and the models of the stages named in compare.policies. Leaves RUN/compare/{report.html, report.md,
summary.json, samples.jsonl}. The judge is the gold score of the embedded world, a reward model of its own on prompts that stage 2 never
saw, or (said in the report's first line) the training reward.
Each policy is sampled at compare.temperature; best_of_N takes the SFT model's N answers and keeps the one the reward model likes best.
"""

import re
import sys
from pathlib import Path

from rlhf.cli import run_stage
from rlhf.comparison import summarise, verdict
from rlhf.compute import describe, gather_rows, my_share, start
from rlhf.config import Config
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl, write_json, write_jsonl
from rlhf.models import attention_kernel, backbone, load_encoder, load_policy
from rlhf.passes import logprob_sums
from rlhf.progress import say
from rlhf.prompts import Prompt, gold_scores, load_prompts
from rlhf.report import write_report
from rlhf.runs import open_stage, source_commit, versions
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import Scorer, load_scorer, member_folders

BEST_OF = re.compile(r"best_of_(\d+)")


def main(config: Config) -> None:
    settings, run = config.compare, Path(config.run.dir)
    sources = {name: source for name in settings.policies if (source := _source(config, name)) is not None}
    needed, used = ("prepare", "sft", "reward"), ("ppo", "judge")
    parents = needed + tuple(stage for stage in used if (run / stage / "DONE").is_file())
    stage = open_stage("compare", config, parents=parents)
    if stage.done:
        say(f"compare: already done: {stage.folder / 'report.html'}")
        return
    accelerator = start(config)
    attention = attention_kernel(config.model.attention, accelerator.device)
    encoder = load_encoder(str(run / "sft" / "model"))
    prompts = load_prompts(config.run.dir, "test", encoder, config.data.max_prompt_tokens)[: settings.prompts]
    say(f"compare: {describe(accelerator)}; {len(prompts)} held-out prompts x {', '.join(settings.policies)}")

    def load(source: str):
        return load_policy(source, encoder, attention, config.model.trust_remote_code).to(accelerator.device).eval()

    sft = load(str(run / "sft" / "model"))
    folders = member_folders(run / "reward", config.reward.members)
    proxy = load_scorer(folders, config.ppo.ensemble, config.ppo.uncertainty_coef, attention, accelerator.device)
    answers = {}
    for place, name in enumerate(settings.policies):
        best_of = BEST_OF.fullmatch(name)
        policy = sft if sources[name] == "sft" else load(sources[name])
        answers[name] = _answers(config, accelerator, policy, sft, encoder, proxy, prompts, int(best_of[1]) if best_of else 1, place)
        say(f"compare: {name} answered")
    judge, scores = _judge(config, accelerator, attention, encoder, prompts, answers)
    if not stage.main:
        return
    samples = _samples(prompts, answers, scores, judge)
    summary = summarise(samples, judge, settings.policies, proxy_is_judge=judge == "proxy")
    summary["run"] = {"config": config.run.dir, "seed": config.seed, "commit": source_commit(), "temperature": settings.temperature,
                      "max_completion_tokens": config.data.max_completion_tokens, "versions": versions()}
    write_jsonl(stage.folder / "samples.jsonl", samples)
    write_json(stage.folder / "summary.json", summary)
    write_report(stage.folder, summary, samples, _curves(run), f"SFT against PPO: {run.name}")
    say(f"compare: {verdict(summary)}")
    say(f"compare: the report is {(stage.folder / 'report.html').resolve()}")
    stage.finish(verdict=verdict(summary))


def _source(config: Config, name: str) -> str:
    """Where the policy `name` lies: "sft" for SFT and best_of_N, else a model folder or hub id. Raises InputError."""
    if name == "sft" or BEST_OF.fullmatch(name):
        return "sft"
    if name == "pretrained":
        return backbone(config)
    folder = Path(config.run.dir) / name / "model"
    if not (folder.parent / "DONE").is_file():
        raise InputError(f"compare.policies names {name}, and {folder.parent} holds no finished stage; run `python -m stages.{name}` first, "
                         f"or leave {name} out")
    return str(folder)


def _answers(config, accelerator, policy, sft, encoder, proxy: Scorer, prompts: list[Prompt], n: int, place: int) -> list[dict]:
    """An answer to each prompt: ids, text, proxy score, KL to SFT; of n samples the one with the highest proxy score."""
    mine, kept = my_share(accelerator, prompts), []
    size = config.compare.batch_size
    for draw in range(n):
        uniforms_BC = my_share(accelerator, draw_uniforms(len(prompts), config.data.max_completion_tokens, config.seed, 3, place, draw))
        with accelerator.autocast():
            completions = sample(policy, [p.ids for p in mine], uniforms_BC, encoder, config.compare.temperature, size)
            scores = proxy([p.messages for p in mine], completions, encoder).tolist()
        for i, (completion, score) in enumerate(zip(completions, scores, strict=True)):
            if draw == 0:
                kept.append((completion, score))
            elif score > kept[i][1]:
                kept[i] = (completion, score)
    pairs = [(p.ids, completion) for p, (completion, _) in zip(mine, kept, strict=True)]
    kls = [None] * len(mine)
    if n == 1:
        with accelerator.autocast():
            of = [logprob_sums(m, pairs, encoder.pad_id, config.compare.temperature, config.ppo.microbatch_tokens) for m in (policy, sft)]
        kls = [a - b for a, b in zip(*of, strict=True)]
    rows = [{"ids": c, "text": encoder.decode(c), "proxy": s, "kl": kl, "length": len(c), "ended": encoder.ended(c)}
            for (c, s), kl in zip(kept, kls, strict=True)]
    return gather_rows(accelerator, rows)


def _judge(config: Config, accelerator, attention, encoder, prompts, answers) -> tuple[str, dict]:
    """The judge's name and its scores by policy. Raises InputError for a judge that is not there."""
    run, wanted = Path(config.run.dir), config.compare.judge
    gold = {name: gold_scores(prompts, [a["text"] for a in rows]) for name, rows in answers.items()}
    has_gold = all(scores is not None for scores in gold.values())
    if wanted == "auto":
        wanted = "gold" if has_gold else "judge" if (run / "judge" / "DONE").is_file() else "proxy"
    if wanted == "proxy":
        return "proxy", {name: [a["proxy"] for a in rows] for name, rows in answers.items()}
    if wanted == "gold":
        if not has_gold:
            raise InputError("compare.judge=gold: these prompts are not of the embedded world, so no gold score exists; use judge, proxy or a folder")
        return "gold", gold
    folder = run / "judge" / "model" if wanted == "judge" else Path(wanted)
    if not folder.is_dir():
        raise InputError(f"compare.judge={wanted}: {folder} is not there. The reward stage makes a judge when data.judge_fraction is above 0; "
                         "a reward model's folder may be named instead")
    scorer = load_scorer([folder], "mean", 0.0, attention, accelerator.device)
    messages = [p.messages for p in prompts]
    with accelerator.autocast():
        return wanted, {name: scorer(messages, [a["ids"] for a in rows], encoder).tolist() for name, rows in answers.items()}


def _samples(prompts: list[Prompt], answers: dict, scores: dict, judge: str) -> list[dict]:
    """The lines of samples.jsonl."""
    rows = []
    for i, prompt in enumerate(prompts):
        given = {}
        for name, policy_answers in answers.items():
            answer = {k: v for k, v in policy_answers[i].items() if k != "ids"}
            given[name] = {**answer, "judge": scores[name][i], "gold": scores[name][i] if judge == "gold" else None}
        rows.append({"id": prompt.id, "family": prompt.family, "prompt": prompt.messages, "answers": given})
    return rows


def _curves(run: Path) -> dict[str, list[dict]]:
    """metrics.jsonl of every stage that has one."""
    paths = [run / name / "metrics.jsonl" for name in ("pretrain", "sft", "reward", "ppo")]
    return {path.parent.name: list(read_jsonl(path)) for path in paths if path.is_file()}


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
