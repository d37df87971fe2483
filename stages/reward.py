"""Stage 2b, reward: a reward model from rankings of K answers (TRL's RewardTrainer on ids of our encoder); with data.judge_fraction, a judge too.

    python -m stages.reward --config configs/quickstart.yaml [reward.members=3]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml \\
        -m stages.reward

Reads RUN/data/preferences (by prepare or collect) and RUN/sft/model. Leaves RUN/reward/{model, model_1, ...}, a reward model per member whose
normalisation stands in its config.json (reward_gain, reward_bias; CANON R5), and metrics.json with what they get right on held-out
prompts (R6). The judge, in RUN/judge, is made alike from the prompts kept apart for it, with another seed.
Simplified on purpose: held-out accuracy is measured at the end alone; an ensemble is measured by the mean of its members' raw scores.
"""

import sys
from pathlib import Path

import torch

from rlhf.cli import run_stage
from rlhf.compute import describe, peak_memory_mb, precision, start
from rlhf.config import Config
from rlhf.data.shortcuts import MIN_PROMPTS, Pair, words_learned
from rlhf.encoded import EncodedRows, encoded_rows, write_drops
from rlhf.encoding import Encoder
from rlhf.errors import InputError, TrainingStopped
from rlhf.jsonl import replacing_folder, write_json
from rlhf.memory import give_back
from rlhf.models import (
    add_lora,
    attention_kernel,
    compile_blocks,
    init_reward_head,
    load_encoder,
    load_policy,
    load_reward_model,
    parameters_in_words,
    save_model,
)
from rlhf.passes import check_length
from rlhf.progress import counted, say
from rlhf.prompts import load_prompts
from rlhf.rankings import encode_rankings, evaluate_rankings, judge_share, normalisation, with_flips
from rlhf.runs import Stage, file_digest, open_stage
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import RewardModelScorer, member_folders, raw_scores
from rlhf.sharding import full_weights, whole
from rlhf.trl_trainers import RankingTrainer, Recipe, count_steps, last_checkpoint
from rlhf.workers import workers_for

JUDGE_SEED = 7777  # added to the seed of the members
WORD_PAIRS = 5000  # training pairs that the bag of words learns from, roughly


def main(config: Config, within: str = "") -> None:
    given = bool(config.data.preferences)
    parents = ("prepare", "sft") if given else ("prepare", "sft", str(Path(within) / "collect"))
    preferences = Path(config.run.dir) / ("" if given else within) / "data" / "preferences"
    _train_and_measure(open_stage("reward", config, parents=parents, within=within), config, preferences)
    if config.data.judge_fraction and not within:
        _train_and_measure(open_stage("judge", config, parents=parents), config, preferences)


def _train_and_measure(stage: Stage, config: Config, preferences: Path) -> None:
    if stage.done:
        say(f"{stage.name}: already done in {stage.folder}")
        return
    accelerator, settings = start(config), config.reward
    sft = str(Path(config.run.dir) / "sft" / "model")
    source = sft if settings.init == "sft" else settings.init
    encoder = load_encoder(source, config.model.trust_remote_code)
    train, held_out = (_rankings(stage, preferences / f"{split}.jsonl", encoder, config) for split in ("train", "eval"))
    seeds = [config.seed * 1000 + JUDGE_SEED] if stage.name == "judge" else [config.seed * 1000 + m for m in range(settings.members)]
    folders = member_folders(stage.folder, len(seeds))
    steps = count_steps(len(train), settings.batch_size, settings.epochs)
    answers = train.items_in("completions")
    longest = max(rows.largest("longest") for rows in (train, held_out))
    say(f"{stage.name}: {describe(accelerator)}; starts from {source}" + (f"; {len(seeds)} members" if len(seeds) > 1 else ""))
    say(f"{stage.name}: {settings.epochs:g} x {len(train):,} prompts / {settings.batch_size} = {counted(steps, 'step')}; "
        f"{answers / len(train):.1f} answers a prompt, each through the model once")

    finished = sum(folder.is_dir() for folder in folders)
    stage.forget_after(finished * steps + last_checkpoint(_checkpoints(stage, finished))[1], closing="peak_memory_mb")
    samples = None
    for member, (seed, folder) in enumerate(zip(seeds, folders, strict=True)):
        if folder.is_dir():
            say(f"{stage.name}: {folder.name} is already there")
            continue
        reward_model = _train(stage, config, source, encoder, accelerator.device, train, longest, steps, seed, member)
        weights = full_weights(reward_model, keep=stage.main)
        with whole(reward_model):
            if stage.main:
                samples = samples or _sft_samples(config, sft, accelerator)
                _normalise(reward_model, encoder, samples, accelerator)
        if stage.main:
            with replacing_folder(folder) as partial:
                save_model(reward_model, encoder, partial, weights)
        reward_model = weights = None
        give_back()  # the next member's memory is on top of what this one keeps
    if stage.main:
        write_drops(stage.folder, {f"preferences/{split}.jsonl": rows for split, rows in (("train", train), ("eval", held_out))})
        _measure(stage, config, accelerator, encoder, folders, train, held_out)
    accelerator.wait_for_everyone()


def _rankings(stage: Stage, path: Path, encoder: Encoder, config: Config) -> EncodedRows:
    """Encoded rankings of a split, of the prompts that are this stage's to learn from. Raises InputError when none is left to train on."""
    limits, training, for_judge = config.data, path.stem == "train", stage.name == "judge"
    rules = (limits.max_prompt_tokens, limits.max_completion_tokens, config.reward.ties)
    flip_rate = config.reward.flip_rate if training and not for_judge else 0.0
    kept = encoded_rows(
        path, encoder, "rankings", (*rules, flip_rate, limits.judge_fraction, for_judge) if training else rules,
        lambda rows: encode_rankings(with_flips(rows, flip_rate), encoder, *rules),
        wanted=lambda row: not training or judge_share(row["id"], limits.judge_fraction) == for_judge)
    if len(kept) < kept.read:
        say(f"{stage.name}: {kept.read - len(kept):,} of {kept.read:,} {path.stem} rankings left out: longer than data.max_prompt_tokens="
            f"{limits.max_prompt_tokens} or data.max_completion_tokens={limits.max_completion_tokens}, or all answers tied; {stage.name}/drops.json "
            "lists them at the end")
    if answers := kept.total("left_out"):
        say(f"{stage.name}: left out {answers:,} answers longer than data.max_completion_tokens={limits.max_completion_tokens} from the "
            f"{len(kept):,} {path.stem} rankings that stay")
    if training and not kept:
        raise InputError(f"{path}: none of {kept.read} rankings is left for {stage.name} (data.judge_fraction={limits.judge_fraction}, "
                         f"data.max_prompt_tokens={limits.max_prompt_tokens}, data.max_completion_tokens={limits.max_completion_tokens}, "
                         f"reward.ties={config.reward.ties}); change them or give more preferences")
    return kept


def _train(stage: Stage, config: Config, source: str, encoder: Encoder, device, train: EncodedRows, longest: int, steps: int, seed: int, member: int):
    """One reward model, trained; its head is drawn anew unless `source` already is a sequence classifier (CANON R1)."""
    settings, attention = config.reward, attention_kernel(config.model.attention, device)
    torch.manual_seed(seed)  # draws what `source` lacks beside the head: the pooler of an encoder that was pretrained without one
    reward_model = load_reward_model(source, encoder, attention, config.model.trust_remote_code)
    check_length(reward_model, longest)
    reward_model.config.use_cache = False
    reward_model.config.reward_gain, reward_model.config.reward_bias = 1.0, 0.0
    if not any(name.endswith("ForSequenceClassification") for name in reward_model.config.architectures or []):
        init_reward_head(reward_model, torch.Generator().manual_seed(seed))
    reward_model = add_lora(reward_model, config.model.lora_rank, config.model.lora_alpha, "SEQ_CLS")
    say(f"{stage.name}: {parameters_in_words(reward_model)}; seed {seed}")
    compile_blocks(reward_model, config.model.compile)
    recipe = Recipe("reward", steps, settings.batch_size, settings.microbatch, settings.lr, "linear", seed, precision(config.run.precision))
    trainer = RankingTrainer(reward_model, train, encoder, recipe, config.run, _checkpoints(stage, member), settings.ties)
    figures = {"member": member} if settings.members > 1 and stage.name == "reward" else {}
    trainer.follow(stage, config.run.keep_checkpoints, stage.name, member * steps, train.table["id"], **figures)
    trainer.run()
    return trainer.accelerator.unwrap_model(trainer.model)


def _checkpoints(stage: Stage, member: int) -> Path:
    return stage.checkpoints / f"member_{member}"


def _sft_samples(config: Config, sft: str, accelerator) -> tuple[list, list, Encoder]:
    """(prompts as messages, completions as ids, their encoder): one answer of the SFT model to each of reward.normalise_prompts prompts.

    Answers that did not end are left out where others did: their score will be ppo.missing_eos_score.
    """
    encoder = load_encoder(sft, config.model.trust_remote_code)
    prompts = load_prompts(config.run.dir, "train", encoder, config.data.max_prompt_tokens).some(config.reward.normalise_prompts)
    policy = load_policy(sft, encoder, attention_kernel(config.model.attention, accelerator.device), config.model.trust_remote_code)
    uniforms_BC = draw_uniforms(len(prompts), config.data.max_completion_tokens, config.seed, 5)
    workers = workers_for(accelerator, policy)
    with accelerator.autocast():
        completions = sample(policy.to(accelerator.device).eval(), [p.ids for p in prompts], uniforms_BC, encoder, 1.0, 256, workers)
    ended = [i for i, ids in enumerate(completions) if encoder.ended(ids)]
    picked = ended if len(ended) > 1 else range(len(prompts))
    return [prompts[i].messages for i in picked], [completions[i] for i in picked], encoder


def _normalise(reward_model, encoder: Encoder, samples: tuple, accelerator) -> None:
    """Writes gain and bias into the model's config (CANON R5). Raises TrainingStopped for scores that are no numbers."""
    prompts, completions, policy_encoder = samples
    with accelerator.autocast():
        raw_B = RewardModelScorer(reward_model, encoder)(prompts, completions, policy_encoder)
    try:
        reward_model.config.reward_gain, reward_model.config.reward_bias = normalisation(raw_B)
    except ValueError as error:
        raise TrainingStopped(f"reward: {error} after training, on answers of the SFT model; lower reward.lr and run the stage again") from None


def _measure(stage: Stage, config: Config, accelerator, encoder: Encoder, folders: list[Path], train: EncodedRows, held_out: EncodedRows) -> None:
    """Loads what was saved, scores held-out rankings and as many training ones, writes metrics.json and DONE."""
    rows = train.some(len(held_out)) + held_out[:]
    answers = [row["prompt"] + completion for row in rows for completion in row["completions"]]
    totals, normalised = torch.zeros(len(answers)), []
    for folder in folders:
        model = load_reward_model(str(folder), encoder, attention_kernel(config.model.attention, accelerator.device), config.model.trust_remote_code)
        normalised.append({"gain": model.config.reward_gain, "bias": model.config.reward_bias})
        with accelerator.autocast():
            totals += raw_scores(model.to(accelerator.device).eval(), answers, encoder.pad_id)
    scores = [part.tolist() for part in (totals / len(folders)).split([len(row["completions"]) for row in rows])]
    seen = len(rows) - len(held_out)
    figures, on_train = _figures(held_out, scores[seen:], config.reward.ties), _figures(rows[:seen], scores[:seen], config.reward.ties)
    if figures is not None:
        answers_each = train.items_in("completions") / len(train)
        read = train.some(max(MIN_PROMPTS, round(WORD_PAIRS / (answers_each * (answers_each - 1) / 2))))
        words = words_learned(_pairs(read, encoder), _pairs(held_out[:], encoder))
        figures |= {"bag_of_words_accuracy": words and words.value, "bag_of_words_ci95": words and [words.low, words.high]}
    steps = count_steps(len(train), config.reward.batch_size, config.reward.epochs)
    training = {"prompts": len(train), "answers": train.items_in("completions"), "steps": steps,
                **({name: on_train[name] for name in ("accuracy", "loss", "pairs")} if on_train else {})}
    write_json(stage.folder / "metrics.json", {"eval": figures, "train": training, "normalisation": normalised[0], "members": len(folders)})
    if figures is None:
        say(f"{stage.name}: no held-out pairs to measure on; model in {folders[0]}")
    else:
        stage.log(steps * len(folders), eval_accuracy=figures["accuracy"], eval_loss=figures["loss"], peak_memory_mb=peak_memory_mb())
        low, high = figures["ci95"]
        noise_free = figures["noise_free_accuracy"]
        say(f"{stage.name}: orders {figures['accuracy']:.3f} of {figures['pairs']:,} held-out pairs right (95 % interval {low:.3f}-{high:.3f}; "
            f"the longer one wins: {figures['longer_wins_accuracy']:.3f}" + (f", a bag of words: {words.value:.3f}" if words else "") + ")"
            + (f"; by noise-free labels {noise_free:.3f}" if noise_free else ""))
    stage.finish(eval_accuracy=figures and figures["accuracy"], members=[file_digest(f / "model.safetensors") for f in folders])


def _pairs(rows: list[dict], encoder: Encoder) -> list[Pair]:
    """Better and worse answers as text."""
    answers = [(row["id"], list(zip(row["ranks"], map(encoder.decode, row["completions"]), strict=True))) for row in rows]
    return [Pair(name, better, worse) for name, ranked in answers for rank, better in ranked for other, worse in ranked if rank < other]


def _figures(rows: list[dict], scores: list[list[float]], ties: str) -> dict | None:
    """CANON R6, or None where there is no pair to measure on."""
    return evaluate_rankings(rows, scores, ties) if any(len(set(row["ranks"])) > 1 for row in rows) else None


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
