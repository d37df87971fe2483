"""Stage 1, sft: the backbone learns to answer as the demonstrations do (TRL's SFTTrainer on ids of our encoder).

    python -m stages.sft --config configs/quickstart.yaml [sft.epochs=2]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m stages.sft

Reads RUN/data/demonstrations and RUN/pretrain/model (or model.init). Leaves RUN/sft/model: policy, reference and start of the reward model.
The loss is on the completion and the end token that closes it; sft.lm_loss_weight adds the prompt's (CANON B5). Which rows a step sees
follows from seed and lengths alone. LoRA adapters are merged before saving.
Simplified on purpose: the last passes' remainder is rounded to a whole step, and held-out loss is measured at the end alone.
"""

import sys
from pathlib import Path

import torch

from rlhf.cli import run_stage
from rlhf.compute import describe, peak_memory_mb, precision, start
from rlhf.config import Config
from rlhf.encoded import EncodedRows, demonstrations, write_drops
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.jsonl import replacing_folder
from rlhf.losses import language_model_loss
from rlhf.models import add_lora, attention_kernel, backbone, compile_blocks, load_encoder, load_policy, parameters_in_words, save_model
from rlhf.passes import by_tokens, make_rows, policy_pass
from rlhf.progress import counted, say
from rlhf.runs import open_stage
from rlhf.sampling import check_backbone
from rlhf.sharding import full_weights, whole
from rlhf.trl_trainers import DemonstrationTrainer, Recipe, count_steps, last_checkpoint

EVAL_TOKENS = 8192  # in memory at once


def main(config: Config) -> None:
    run, settings = Path(config.run.dir), config.sft
    stage = open_stage("sft", config, parents=("prepare",) if config.model.init else ("prepare", "pretrain"))
    if stage.done:
        say(f"sft: already done in {stage.folder}")
        return
    accelerator = start(config)
    attention = attention_kernel(config.model.attention, accelerator.device)
    source = backbone(config)
    encoder = load_encoder(source, config.model.trust_remote_code)
    train = _demonstrations(run, "train", encoder, config)
    held_out = _demonstrations(run, "eval", encoder, config)
    policy = load_policy(source, encoder, attention, config.model.trust_remote_code)
    if config.model.init:
        check_backbone(policy, encoder, config.data.max_prompt_tokens + config.data.max_completion_tokens)
    policy = add_lora(policy, config.model.lora_rank, config.model.lora_alpha, "CAUSAL_LM")
    compile_blocks(policy, config.model.compile)

    steps = count_steps(len(train), settings.batch_size, settings.epochs)
    say(f"sft: {describe(accelerator)}; {parameters_in_words(policy)}, from {source}")
    say(f"sft: {settings.epochs:g} x {len(train):,} demonstrations / {settings.batch_size} = {counted(steps, 'step')}; "
        f"{train.items_in('completion'):,} completion tokens")
    recipe = Recipe("sft", steps, settings.batch_size, settings.microbatch, settings.lr, "cosine", config.seed, precision(config.run.precision))
    trainer = DemonstrationTrainer(policy, train, encoder, recipe, config.run, stage.checkpoints, settings.lm_loss_weight)
    trainer.follow(stage, config.run.keep_checkpoints, "sft", ids=train.table["id"])
    stage.forget_after(last_checkpoint(stage.checkpoints)[1], closing="peak_memory_mb")
    trainer.run()

    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = full_weights(policy, keep=stage.main)
    with whole(policy):
        if stage.main:
            with accelerator.autocast():
                eval_loss = _eval_loss(policy, held_out, encoder.pad_id, accelerator.device)
    if stage.main:
        with replacing_folder(stage.model) as folder:
            save_model(policy, encoder, folder, weights)
        figures = {} if eval_loss is None else {"eval_loss": eval_loss}
        stage.log(steps, **figures, peak_memory_mb=peak_memory_mb())
        say(f"sft: held-out loss {'unknown (no held-out rows)' if eval_loss is None else f'{eval_loss:.3f} nats a token'}; model in {stage.model}")
        write_drops(stage.folder, {"demonstrations/train.jsonl": train, "demonstrations/eval.jsonl": held_out})
        stage.finish(eval_loss=eval_loss, steps=steps, demonstrations=len(train))
    accelerator.wait_for_everyone()


def _demonstrations(run: Path, split: str, encoder: Encoder, config: Config) -> EncodedRows:
    """(prompt ids, completion ids with EOS) of a split; rows too long are left out and counted. Raises InputError when none is left to train on."""
    path, limits = run / "data" / "demonstrations" / f"{split}.jsonl", config.data
    kept = demonstrations(path, encoder, limits.max_prompt_tokens, limits.max_completion_tokens)
    if len(kept) < kept.read:
        say(f"sft: {kept.read - len(kept):,} of {kept.read:,} {split} demonstrations left out, longer than data.max_prompt_tokens="
            f"{limits.max_prompt_tokens} or data.max_completion_tokens={limits.max_completion_tokens}; sft/drops.json lists them at the end")
    if not kept and split == "train":
        raise InputError(f"{path}: none of {kept.read} demonstrations is short enough to train on; raise data.max_prompt_tokens="
                         f"{limits.max_prompt_tokens} or data.max_completion_tokens={limits.max_completion_tokens}, or give other demonstrations")
    return kept


@torch.inference_mode()
def _eval_loss(policy, rows: EncodedRows, pad_id: int, device) -> float | None:
    """Mean over all completion tokens, nats; None without rows."""
    total, count = 0.0, 0
    for group in by_tokens(rows.lengths.tolist(), EVAL_TOKENS) if rows else []:
        batch = make_rows(*zip(*(rows[i] for i in group), strict=True), pad_id, device)
        loss, tokens = language_model_loss(policy_pass(policy, batch, 1.0)[0], batch.mask_BC)
        total, count = total + loss.item(), count + int(tokens)
    return total / count if count else None


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
