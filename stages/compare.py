"""Stage 4, compare: the same held-out prompts to every policy, judged, with intervals; ends in a report that can say "no difference".

    python -m stages.compare --config configs/quickstart.yaml [compare.shots=1]

Reads RUN/data/prompts/test.jsonl and the models of the stages named in compare.policies. Leaves RUN/compare/{report.html, report.md,
summary.json, samples.jsonl}. The judge is the gold score of the embedded world, a reward model of its own on prompts that stage 2 never
saw, a function of yours that is shown two answers in both orders, or (said in the report's first line) the training reward.
Each policy is sampled at compare.temperature; best_of_N takes the SFT model's N answers and keeps the one the reward model likes best,
sft_at_T samples SFT at the temperature T.
With compare.shots each policy of its own weights also answers tasks of the embedded world after so many solved examples (rlhf/in_context.py).
"""

import json
import os
import re
import sys
from pathlib import Path

from rlhf.cli import run_stage
from rlhf.comparison import BEST_OF, COOLED, ROUND, SANITY, PairJudge, summarise, verdict, verdicts
from rlhf.compute import describe, gather_rows, my_share, start
from rlhf.config import RANGES, Config
from rlhf.contents import JUDGES, is_function
from rlhf.errors import InputError
from rlhf.in_context import draw_tasks, in_context_scores, summarise_in_context, tasks_that_fit
from rlhf.jsonl import read_jsonl, write_json, write_jsonl
from rlhf.models import attention_kernel, backbone, load_encoder, load_policy, longest_row, untrained_policy
from rlhf.passes import logprob_sums
from rlhf.progress import say
from rlhf.prompts import Prompt, gold_scores, load_prompts
from rlhf.report import write_report
from rlhf.runs import open_stage, source_commit, versions
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import CallableJudge, Scorer, load_scorer, member_folders
from rlhf.workers import workers_for

REWARD_MODELS = re.compile(r"(round_\d+/)?(reward|judge)/model(_\d+)?")
NAMES = re.compile(rf"pretrained|sft|sft_again|untrained|ppo|ppo_last|{BEST_OF.pattern}|{COOLED.pattern}|{ROUND.pattern}")
MADE_BY = ("pretrained (made by pretrain, or named by model.init); sft, sft_again, untrained, best_of_N, sft_at_T (by sft); ppo, ppo_last (by ppo); "
           "round_N/ppo (by pipeline with pipeline.rounds above N)")


def main(config: Config) -> None:
    settings, run = config.compare, Path(config.run.dir)
    check_settings(config)
    sources = {name: _source(config, name) for name in settings.policies}
    needed, used = ("prepare", "sft", "reward"), ("ppo", "judge")
    parents = needed + tuple(stage for stage in used if (run / stage / "DONE").is_file())
    stage = open_stage("compare", config, parents=parents)
    if stage.done:
        found = json.loads((stage.folder / "DONE").read_text(encoding="utf-8"))["verdict"]
        say(f"compare: already done: {found}")
        say(f"compare: the report is {(stage.folder / 'report.html').resolve()}")
        return
    accelerator = start(config)
    attention = attention_kernel(config.model.attention, accelerator.device)
    encoder = load_encoder(str(run / "sft" / "model"), config.model.trust_remote_code)
    held_out = load_prompts(config.run.dir, "test", encoder, config.data.max_prompt_tokens)
    prompts = held_out.some(settings.prompts)
    judge = _judge_of(config, prompts)
    say(f"compare: {describe(accelerator)}; {len(prompts)} of {len(held_out)} held-out prompts x {', '.join(settings.policies)}")

    def load(source: str):
        if source == "untrained":
            policy = untrained_policy(str(run / "sft" / "model"), encoder, attention, config.seed, config.model.trust_remote_code)
        else:
            policy = load_policy(source, encoder, attention, config.model.trust_remote_code)
        return policy.to(accelerator.device).eval()

    sft = load(str(run / "sft" / "model"))
    folders = member_folders(run / "reward", config.reward.members)
    proxy = load_scorer(folders, config.ppo.ensemble, config.ppo.uncertainty_coef, attention, accelerator.device, config.model.trust_remote_code,
                        workers_for(accelerator, sft))
    tasks, answers, in_context = _tasks(config, encoder, longest_row(sft)), {}, {}
    for place, name in enumerate(settings.policies):
        best_of, cooled = BEST_OF.fullmatch(name), COOLED.fullmatch(name)
        temperature = float(cooled[1]) if cooled else settings.temperature
        policy = sft if sources[name] == "sft" else load(sources[name])
        answers[name] = _answers(config, accelerator, policy, sft, encoder, proxy, prompts, int(best_of[1]) if best_of else 1, place, temperature)
        if tasks and not best_of and not cooled and name not in SANITY:
            in_context[name] = {shots: _in_context(config, accelerator, policy, encoder, tasks, shots) for shots in settings.shots}
        policy = None  # before the next one is loaded
        say(f"compare: {name} answered")
    scores, pair_judge = _judged(config, judge, accelerator, attention, encoder, prompts, answers)
    if not stage.main:
        return
    samples = _samples(prompts, answers, scores, judge)
    rewards = {Path(source).resolve() for source in (*([] if config.ppo.score else folders), *config.ppo.mix)}
    judging = {"proxy": folders, "judge": [run / "judge" / "model"]}.get(judge, [Path(judge)])
    is_proxy = not rewards.isdisjoint(folder.resolve() for folder in judging)
    summary = summarise(samples, judge, settings.policies, proxy_is_judge=is_proxy, pair_judge=pair_judge)
    summary["n_held_out"] = len(held_out)
    summary["judge_held_out"] = _held_out(run, judge) if pair_judge is None else None
    summary["proxy_held_out"] = _held_out(run, "proxy")
    if in_context:
        summary["in_context"] = summarise_in_context(in_context)
    summary["run"] = {"folder": config.run.dir, "seed": config.seed, "commit": source_commit(), "temperature": settings.temperature,
                      "max_completion_tokens": config.data.max_completion_tokens, "versions": versions()}
    write_jsonl(stage.folder / "samples.jsonl", samples)
    write_json(stage.folder / "summary.json", summary)
    write_report(stage.folder, summary, samples, _curves(run), f"SFT against PPO: {run.name}")
    say(f"compare: {verdict(summary)}")
    say(f"compare: the report is {(stage.folder / 'report.html').resolve()}")
    stage.finish(verdict=verdict(summary))


def check_settings(config: Config) -> None:
    """InputError for a policy or a judge that no stage of the run will make: the pipeline asks before the first of them."""
    run, settings = Path(config.run.dir), config.compare
    low, high = RANGES["compare.temperature"]
    for name in settings.policies:
        if not NAMES.fullmatch(name):
            raise InputError(f"compare.policies: found {name!r}, wanted some of {MADE_BY}")
        if (cooled := COOLED.fullmatch(name)) and not low <= float(cooled[1]) <= high:
            raise InputError(f"compare.policies names {name}: found temperature {cooled[1]}, wanted one from {low} to {high}")
    if is_function(settings.judge):
        CallableJudge(settings.judge)
    elif settings.judge not in JUDGES and not Path(settings.judge).is_dir() and not _to_be_made(run, settings.judge):
        raise InputError(f"compare.judge: found {settings.judge!r}, wanted {', '.join(JUDGES)}, a reward model's folder or module:function")
    if settings.judge == "judge" and config.data.judge_fraction == 0 and not (run / "judge").is_dir():
        raise InputError("compare.judge=judge: found data.judge_fraction=0, which makes no judge; wanted a share of the prompts for it, say 0.3")


def _to_be_made(run: Path, judge: str) -> bool:
    """Whether a folder is where the run's reward models will lie."""
    return REWARD_MODELS.fullmatch(os.path.relpath(Path(judge).resolve(), run.resolve())) is not None


def _source(config: Config, name: str) -> str:
    """Where the policy `name` lies: "sft" for SFT and what draws from it, "untrained", else a model folder or hub id. Raises InputError."""
    if name in ("sft", "sft_again") or COOLED.fullmatch(name) or BEST_OF.fullmatch(name):
        return "sft"
    if name == "untrained":
        return name
    if name == "pretrained":
        return backbone(config)
    folder = Path(config.run.dir) / ("ppo/model_last" if name == "ppo_last" else f"{name}/model")
    if not (folder.parent / "DONE").is_file():
        stage = "ppo" if name in ("ppo", "ppo_last") else "pipeline"  # which alone makes the rounds before the last
        raise InputError(f"compare.policies names {name}, and {folder.parent} holds no finished stage; run `python -m stages.{stage}` first, or "
                         f"leave {name} out")
    if not folder.is_dir():
        raise InputError(f"compare.policies names {name}, and {folder} is not there: ppo.ema_decay was 0, so ppo is what ppo_last would be; "
                         f"leave {name} out")
    return str(folder)


def _answers(config, accelerator, policy, sft, encoder, proxy: Scorer, prompts: list[Prompt], n: int, place: int,
             temperature: float) -> list[dict]:
    """An answer to each prompt, sampled at `temperature`: ids, text, proxy score, KL to SFT at compare.temperature; of n samples the one with
    the highest proxy score."""
    mine, kept = my_share(accelerator, prompts), []
    size, workers = config.compare.batch_size, workers_for(accelerator, policy)
    for draw in range(n):
        uniforms_BC = my_share(accelerator, draw_uniforms(len(prompts), config.data.max_completion_tokens, config.seed, 3, place, draw))
        with accelerator.autocast():
            completions = sample(policy, [p.ids for p in mine], uniforms_BC, encoder, temperature, size, workers)
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
            of = [logprob_sums(m, pairs, encoder.pad_id, t, config.ppo.microbatch_tokens)
                  for m, t in ((policy, temperature), (sft, config.compare.temperature))]
        kls = [a - b for a, b in zip(*of, strict=True)]
    rows = [{"ids": c, "text": encoder.decode(c), "proxy": s, "kl": kl, "length": len(c), "ended": encoder.ended(c)}
            for (c, s), kl in zip(kept, kls, strict=True)]
    return gather_rows(accelerator, rows)


def _tasks(config: Config, encoder, room: int | None) -> list:
    """The tasks for compare.shots that leave room for an answer among the policy's positions; none without shots. Raises InputError."""
    settings = config.compare
    if not settings.shots:
        return []
    drawn = draw_tasks(settings.shot_tasks, max(settings.shots), config.seed)
    kept = tasks_that_fit(drawn, encoder, None if room is None else room - config.data.max_completion_tokens)
    if not kept:
        raise InputError(f"compare.shots={settings.shots}: no task has room for {max(settings.shots)} examples among the policy's {room} positions; "
                         "ask for fewer")
    say(f"compare: {len(kept)} of {len(drawn)} tasks of the embedded world with {', '.join(map(str, settings.shots))} solved examples")
    return kept


def _in_context(config: Config, accelerator, policy, encoder, tasks: list, shots: int) -> list[dict]:
    """The grades of a policy's answers to the tasks (CANON E6); every policy and number of shots gets the same random numbers."""
    uniforms_BC = my_share(accelerator, draw_uniforms(len(tasks), config.data.max_completion_tokens, config.seed, 6))
    with accelerator.autocast():
        grades = in_context_scores(policy, my_share(accelerator, tasks), shots, encoder, uniforms_BC, config.compare.temperature,
                                   config.compare.batch_size, workers_for(accelerator, policy))
    return gather_rows(accelerator, grades)


def _judge_of(config: Config, prompts: list[Prompt]) -> str:
    """Which judge decides: "gold", "proxy", "judge", a folder or a function. Raises InputError for one not there, before anything is sampled."""
    run, wanted = Path(config.run.dir), config.compare.judge
    has_gold = gold_scores(prompts, [""] * len(prompts)) is not None
    if wanted == "auto":
        return "gold" if has_gold else "judge" if (run / "judge" / "DONE").is_file() else "proxy"
    if wanted == "gold" and not has_gold:
        raise InputError("compare.judge=gold: these prompts are not of the embedded world, so no gold score exists; use judge, proxy or a folder")
    if wanted not in ("gold", "proxy") and not is_function(wanted) and not _judge_folder(run, wanted).is_dir():
        raise InputError(f"compare.judge={wanted}: {_judge_folder(run, wanted)} is not there. The reward stage makes a judge when "
                         "data.judge_fraction is above 0; a reward model's folder or a function (module:function) may be named instead")
    return wanted


def _judge_folder(run: Path, judge: str) -> Path:
    """Where the model of a judge lies that is a reward model."""
    return run / "judge" / "model" if judge == "judge" else Path(judge)


def _judged(config: Config, judge: str, accelerator, attention, encoder, prompts, answers) -> tuple[dict, PairJudge | None]:
    """The judge's scores by policy, and the judge itself where it compares two answers."""
    if judge == "proxy":
        return {name: [a["proxy"] for a in rows] for name, rows in answers.items()}, None
    if judge == "gold":
        return {name: gold_scores(prompts, [a["text"] for a in rows]) for name, rows in answers.items()}, None
    if is_function(judge):
        pair_judge = CallableJudge(judge)
        # Asked by the process that writes alone: it may be somebody's paid service
        return _against_one(pair_judge, prompts, answers) if accelerator.is_main_process else {}, pair_judge
    scorer = load_scorer([_judge_folder(Path(config.run.dir), judge)], "mean", 0.0, attention, accelerator.device, config.model.trust_remote_code)
    messages = [p.messages for p in prompts]
    with accelerator.autocast():
        return {name: scorer(messages, [a["ids"] for a in rows], encoder).tolist() for name, rows in answers.items()}, None


def _held_out(run: Path, judge: str) -> dict | None:
    """What a reward model (the judge, the proxy, or one's folder) got right on held-out pairs; None where that was not measured."""
    folder = {"judge": run / "judge", "proxy": run / "reward"}.get(judge, Path(judge).parent)
    path = folder / "metrics.json"
    if judge == "gold" or not path.is_file():
        return None
    held_out = json.loads(path.read_text(encoding="utf-8")).get("eval")
    told = ("accuracy", "ci95", "pairs", "longer_wins_accuracy", "by_margin", "calibration")
    return held_out and {name: held_out[name] for name in told if name in held_out}


def _against_one(pair_judge: PairJudge, prompts: list[Prompt], answers: dict) -> dict[str, list[float]]:
    """Scores from a judge that only compares: 1, 1/2 or 0 for an answer against SFT's (or the first policy's), in both orders."""
    base = [a["text"] for a in answers["sft" if "sft" in answers else next(iter(answers))]]
    messages = [p.messages for p in prompts]
    return {name: verdicts(pair_judge, messages, [a["text"] for a in rows], base).outcomes.tolist() for name, rows in answers.items()}


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
