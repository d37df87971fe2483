"""Stage 0b, pretrain: a small GPT from scratch on the run's own text; skipped when model.init names a backbone.

    python -m stages.pretrain --config configs/quickstart.yaml [seed=2]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml \\
        -m stages.pretrain

Reads RUN/data/text. Leaves RUN/pretrain/model: a GPT-2 of model.size (CANON B1) with a byte-level BPE made from the text.
A row is one document with its end token, or a piece of pretrain.block tokens of a longer one; rows of like length share a batch, and which
batch a step sees follows from (seed, step) alone. GPT-2 packed documents into full rows instead; here copying from the question was then not
learned within the quickstart's budget, because attention has to find the question among strangers (configs/EXPERIMENTS.md).
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlhf.checkpoints import load_checkpoint, save_checkpoint
from rlhf.cli import run_stage
from rlhf.compute import average_gradients, describe, sharded, start, sum_over_processes
from rlhf.config import Config
from rlhf.encoded import EncodedRows, encoded_rows
from rlhf.encoding import Encoder
from rlhf.errors import SKIPS_IN_A_ROW, InputError, TrainingStopped
from rlhf.jsonl import read_jsonl, replacing_folder
from rlhf.logprobs import linear_cross_entropy
from rlhf.masking import WIDTH_STEP, length_mask, right_pad, round_up
from rlhf.memory import Microbatch
from rlhf.models import attention_kernel, load_encoder, new_gpt, parameter_count, save_model, train_tokenizer
from rlhf.optimizers import linear_lr, pretraining_optimizers, set_lr
from rlhf.passes import by_tokens
from rlhf.progress import Progress, counted, say
from rlhf.runs import open_stage
from rlhf.sharding import full_weights
from rlhf.workers import Workers, accumulate, workers_for

TOKENIZER_DOCUMENTS = 50_000  # enough for a stable vocabulary of a few thousand tokens
WARMUP = 0.02
EVAL_ROWS = 256
SORTED_ROWS = 4096  # rows sorted by length together


def main(config: Config) -> None:
    stage = open_stage("pretrain", config, parents=("prepare",))
    if stage.done:
        say(f"pretrain: already done in {stage.folder}")
        return
    if config.model.init is not None:
        say(f"pretrain: skipped, the backbone is model.init={config.model.init}")
        stage.finish(skipped=True)
        return
    settings, accelerator = config.pretrain, start(config)
    data = Path(config.run.dir) / "data" / "text"
    with accelerator.main_process_first():
        encoder = _tokenizer(stage, data / "train.jsonl", config.model.vocab_size)
    rows = _rows(data / "train.jsonl", encoder, settings.block)
    held_out = _rows(data / "eval.jsonl", encoder, settings.block)[:EVAL_ROWS] or rows[:EVAL_ROWS]
    tokens = int(rows.lengths.sum())

    attention = attention_kernel(config.model.attention, accelerator.device)
    gpt = new_gpt(config.model.size, encoder, config.model.context, attention)
    say(f"pretrain: {describe(accelerator)}; {parameter_count(gpt) / 1e6:.1f}M parameters, {tokens:,} tokens of text in {len(rows):,} rows")
    say(f"pretrain: {counted(settings.steps, 'step')} x at most {settings.batch_tokens:,} tokens")
    workers = workers_for(accelerator, gpt)
    optimizers = pretraining_optimizers(gpt, settings.lr, settings.matrix_lr, settings.weight_decay)
    model, *optimizers = accelerator.prepare(NextTokenLoss(gpt), *optimizers)
    budget = settings.batch_tokens // accelerator.num_processes  # padded tokens of a step
    microbatch = Microbatch(budget, "pretrain.batch_tokens", "padded tokens", ("pretrain.block",))
    state = {"skips_in_a_row": 0, **load_checkpoint(accelerator, stage)}
    first, skips = state["step"], state["skips_in_a_row"]
    stage.forget_after(first)
    batches, clock, seen = _batches(rows, budget, config.seed, accelerator), time.perf_counter(), 0

    with Progress("pretrain", settings.steps, first) as bar:
        for step in range(first, settings.steps):
            share = linear_lr(step, settings.steps, WARMUP)
            for optimizer in optimizers:
                set_lr(optimizer, share)
            loss, count = _backward(accelerator, workers, model, batches(step), encoder.pad_id, microbatch)
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            skipped = not (math.isfinite(grad_norm) and math.isfinite(loss))
            skips = skips + 1 if skipped else 0
            if skipped:
                _tell_skip(step + 1, loss, skips, [encoder.decode(row) for row in batches(step)], stage, settings)
            else:
                workers.map(lambda optimizer: optimizer.step(), optimizers)
            for optimizer in optimizers:
                optimizer.zero_grad()
            seen += count
            if (step + 1) % 10 == 0 or step + 1 == settings.steps or skipped:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                figures = dict(loss=loss, lr=share * settings.lr, grad_norm=grad_norm, tokens_per_second=seen / seconds)
                if skipped:
                    figures["skipped_steps"] = 1
                if (step + 1) % 200 == 0 or step + 1 == settings.steps:
                    figures["eval_loss"] = _eval_loss(workers, model, held_out, encoder.pad_id, accelerator.device)
                stage.log(step + 1, **figures)
                bar.update(step + 1, loss=loss, tokens_per_second=int(seen / seconds))
                seen = 0
            if (step + 1) % config.run.save_every == 0 and step + 1 < settings.steps:
                save_checkpoint(accelerator, stage, step + 1, config.run.keep_checkpoints, skips_in_a_row=skips)

    eval_loss = _eval_loss(workers, model, held_out, encoder.pad_id, accelerator.device)
    weights = full_weights(gpt, keep=stage.main)
    if stage.main:
        with replacing_folder(stage.model) as folder:
            save_model(gpt, encoder, folder, weights)
    say(f"pretrain: held-out loss {eval_loss:.3f} nats a token; model in {stage.model}")
    stage.finish(eval_loss=eval_loss)


class NextTokenLoss(nn.Module):
    """A GPT with its loss, so that a wrapper (autocast, DDP) holds both and the output layer runs inside the loss."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self._no_split_modules = gpt._no_split_modules  # what FSDP shards as one

    def forward(self, ids_BT, mask_BT) -> torch.Tensor:
        """Sum over real tokens of -log p of the next one, nats. No attention mask: padding is on the right, where nothing real looks."""
        hidden_BTD = self.gpt.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        real_BT = mask_BT[:, 1:]
        return linear_cross_entropy(hidden_BTD[real_BT], self.gpt.get_output_embeddings().weight, ids_BT[:, 1:][real_BT])


def _tell_skip(step: int, loss: float, skips: int, texts: list[str], stage, settings) -> None:
    """Says which text a step that was left out had (CANON A4). Raises TrainingStopped after several in a row."""
    told = f"loss ({loss}) or gradient of step {step} is not finite; its text begins with {', '.join(repr(t[:40]) for t in texts[:5])}"
    if skips >= min(SKIPS_IN_A_ROW, settings.steps):
        raise TrainingStopped(f"pretrain: {told}. That makes {skips} such steps in a row; none of them changed the weights, and the last checkpoint "
                              f"is in {stage.checkpoints}; lower pretrain.lr, now {settings.lr}")
    say(f"pretrain: {told}; the step was left out")


def _tokenizer(stage, text: Path, vocab_size: int) -> Encoder:
    """Made once per stage folder: processes and resumed runs load the same file."""
    folder = stage.folder / "tokenizer"
    if not folder.is_dir():
        documents = (row["text"] for row in islice(read_jsonl(text), TOKENIZER_DOCUMENTS))
        with replacing_folder(folder) as partial:
            train_tokenizer(documents, vocab_size).save_pretrained(partial)
    return load_encoder(str(folder))


def _rows(path: Path, encoder: Encoder, block: int) -> EncodedRows:
    """Every document with its end token as one row of ids, longer ones in pieces of `block`. Raises InputError when there is nothing to learn."""
    def encode(rows: list[dict]) -> list[dict]:
        documents = encoder.completions_ids([row["text"] for row in rows])
        pieces = [ids[i : i + block] for ids in documents for i in range(0, len(ids), block)]
        return [{"ids": piece, "length": len(piece)} for piece in pieces if len(piece) > 1]

    rows = encoded_rows(path, encoder, "text", (block,), encode, lambda row: row["ids"])
    if not rows and path.stem == "train":
        raise InputError(f"{path}: no text of at least two tokens to learn from; give data.text")
    return rows


def _batches(rows: EncodedRows, budget: int, seed: int, accelerator) -> Callable[[int], list[list[int]]]:
    """A function step -> this process's rows: a new permutation every pass, rows of like length together, within `budget` padded tokens."""
    passes: list[list[list[int]]] = []

    def of_step(step: int) -> list[list[int]]:
        place, number = step * accelerator.num_processes + accelerator.process_index, 0
        while True:
            if number == len(passes):
                passes.append(_one_pass(rows.lengths, budget, seed * 1_000_003 + number))
            if place < len(passes[number]):
                return rows[passes[number][place]]
            place -= len(passes[number])
            number += 1

    return of_step


def _one_pass(lengths: np.ndarray, budget: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order, batches = torch.randperm(len(lengths), generator=generator).tolist(), []
    for start_at in range(0, len(order), SORTED_ROWS):
        window = order[start_at : start_at + SORTED_ROWS]
        batches += [[window[i] for i in group] for group in by_tokens(lengths[window].tolist(), budget)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _backward(accelerator, workers: Workers, model, rows: list[list[int]], pad_id: int, microbatch: Microbatch) -> tuple[float, int]:
    """Leaves the gradient of the mean loss over all processes' tokens in .grad; returns that mean, nats, and the number of tokens."""
    count = int(sum_over_processes(accelerator, torch.tensor(sum(len(row) - 1 for row in rows), device=accelerator.device)))
    width = round_up(max(map(len, rows)), WIDTH_STEP)

    def mean_loss(part):
        loss = _loss(model, part, pad_id, accelerator.device) / count
        return loss * accelerator.num_processes, loss.detach()  # gradients' mean over processes is undone

    def attempt(tokens: int) -> list[torch.Tensor]:
        model.zero_grad()  # of a try that did not fit into memory
        share = max(workers.count, math.ceil(len(rows) * width / tokens))
        parts = [part for start_at in range(share) if (part := rows[start_at::share])]
        return accumulate(accelerator, workers, model, [partial(mean_loss, part) for part in parts])

    losses = microbatch.attempt(attempt, width, sharded(accelerator))
    average_gradients(accelerator, model)
    return sum_over_processes(accelerator, sum(losses)).item(), count


def _loss(model, rows: list[list[int]], pad_id: int, device) -> torch.Tensor:
    """Sum over real tokens of -log p of the next one, nats."""
    ids_BT = right_pad(rows, pad_id, WIDTH_STEP).to(device)
    mask_BT = length_mask([len(r) for r in rows], ids_BT.shape[1]).to(device)
    return model(ids_BT, mask_BT)


def _eval_loss(workers: Workers, model, rows: list[list[int]], pad_id: int, device) -> float:
    @torch.no_grad()
    def loss(group: list[int]) -> float:
        return _loss(model, [rows[i] for i in group], pad_id, device).item()

    return sum(workers.map(loss, by_tokens([len(r) for r in rows], 8192))) / sum(len(r) - 1 for r in rows)


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
