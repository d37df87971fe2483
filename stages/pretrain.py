"""Stage 0b, pretrain: a small GPT from scratch on the run's own text; skipped when model.init names a backbone.

    python -m stages.pretrain --config configs/quickstart.yaml [pretrain.steps=...]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m stages.pretrain

Reads RUN/data/text. Leaves RUN/pretrain/model: a GPT-2 of model.size (CANON B1) with a byte-level BPE made from the text.
Documents are joined with the end token and cut into rows of pretrain.block tokens; which rows a step sees follows from (seed, step) alone.
Simplified on purpose: attention crosses document borders within a row, as in GPT-2.
"""

import math
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from rlhf.checkpoints import load_checkpoint, save_checkpoint
from rlhf.cli import run_stage
from rlhf.compute import describe, start, sum_over_processes
from rlhf.config import Config
from rlhf.encoding import Encoder
from rlhf.errors import InputError, TrainingStopped
from rlhf.jsonl import read_jsonl, replacing_folder
from rlhf.models import attention_kernel, load_encoder, new_gpt, parameter_count, save_model, train_tokenizer
from rlhf.optimizers import linear_lr, new_optimizer, set_lr
from rlhf.progress import Progress, say
from rlhf.runs import open_stage

TOKENIZER_DOCUMENTS = 50_000  # enough for a stable vocabulary of a few thousand tokens
WARMUP = 0.02
EVAL_ROWS = 64


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
    rows = _packed(data / "train.jsonl", encoder, settings.block)
    held_out = _packed(data / "eval.jsonl", encoder, settings.block)[:EVAL_ROWS]
    batch = max(1, settings.batch_tokens // settings.block // accelerator.num_processes)
    tokens = batch * settings.block * accelerator.num_processes

    attention = attention_kernel(config.model.attention, accelerator.device)
    model = new_gpt(config.model.size, encoder, config.model.context, attention)
    say(f"pretrain: {describe(accelerator)}; {parameter_count(model) / 1e6:.1f}M parameters, {rows.numel():,} tokens of text")
    say(f"pretrain: {settings.steps} steps x {tokens:,} tokens ({batch * accelerator.num_processes} x {settings.block}) = "
        f"{settings.steps * tokens / 1e6:.1f}M tokens, {settings.steps * tokens / rows.numel():.1f} passes")
    model, optimizer = accelerator.prepare(model, new_optimizer(model, settings.lr, settings.weight_decay))
    first = load_checkpoint(accelerator, stage)["step"]
    stage.forget_after(first)

    with Progress("pretrain", settings.steps, first) as bar:
        for step in range(first, settings.steps):
            began = time.perf_counter()
            lr = set_lr(optimizer, settings.lr * linear_lr(step, settings.steps, WARMUP))
            ids = _batch(rows, step, batch, config.seed, accelerator).to(accelerator.device)
            loss = _loss(model, ids)
            accelerator.backward(loss)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(grad_norm):
                raise TrainingStopped(f"pretrain: the gradient of step {step + 1} is not finite (loss {loss.item()}); the last good weights are in "
                                      f"{stage.checkpoints}; lower pretrain.lr, now {settings.lr}")
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            if (step + 1) % 10 == 0 or step + 1 == settings.steps:
                figures = dict(loss=loss.item(), lr=lr, grad_norm=float(grad_norm), seconds=seconds, tokens_per_second=tokens / seconds)
                if (step + 1) % 100 == 0 or step + 1 == settings.steps:
                    figures["eval_loss"] = _eval_loss(accelerator, model, held_out)
                stage.log(step + 1, **figures)
            bar.update(step + 1, loss=loss.item(), tokens_per_second=int(tokens / seconds))
            if (step + 1) % config.run.save_every == 0 and step + 1 < settings.steps:
                save_checkpoint(accelerator, stage, step + 1, config.run.keep_checkpoints)

    eval_loss = _eval_loss(accelerator, model, held_out)
    if stage.main:
        with replacing_folder(stage.model) as folder:
            save_model(accelerator.unwrap_model(model), encoder, folder)
    say(f"pretrain: held-out loss {eval_loss:.3f} nats a token; model in {stage.model}")
    stage.finish(eval_loss=eval_loss)


def _tokenizer(stage, text: Path, vocab_size: int) -> Encoder:
    """Made once per stage folder: processes and resumed runs load the same file."""
    folder = stage.folder / "tokenizer"
    if not folder.is_dir():
        documents = (row["text"] for row in islice(read_jsonl(text), TOKENIZER_DOCUMENTS))
        with replacing_folder(folder) as partial:
            train_tokenizer(documents, vocab_size).save_pretrained(partial)
    return load_encoder(str(folder))


def _packed(path: Path, encoder: Encoder, block: int) -> torch.Tensor:
    """All documents as rows of `block` ids, each document closed by the end token. Raises InputError when they do not fill one row."""
    ids: list[int] = []
    texts = [row["text"] for row in read_jsonl(path)]
    for start_at in range(0, len(texts), 10_000):
        batch = encoder.tokenizer(texts[start_at : start_at + 10_000], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for document in batch:
            ids += document
            ids.append(encoder.eos_id)
    if len(ids) < block:
        raise InputError(f"{path}: {len(ids)} tokens of text do not fill one row of pretrain.block={block}; give more text or lower it")
    return torch.tensor(ids[: len(ids) // block * block], dtype=torch.int32).view(-1, block)


def _batch(rows: torch.Tensor, step: int, batch: int, seed: int, accelerator) -> torch.Tensor:
    """This process's rows of a step: consecutive in a permutation of all rows drawn anew for every pass."""
    size = batch * accelerator.num_processes
    places = torch.arange(step * size, (step + 1) * size)
    picked = []
    for epoch in places.div(len(rows), rounding_mode="floor").unique().tolist():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        picked.append(order[places[places // len(rows) == epoch] % len(rows)])
    mine = torch.cat(picked)[accelerator.process_index * batch : (accelerator.process_index + 1) * batch]
    return rows[mine].long()


def _loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token, nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _eval_loss(accelerator, model, rows: torch.Tensor) -> float:
    total = sum(_loss(model, rows[i : i + 16].long().to(accelerator.device)) * len(rows[i : i + 16]) for i in range(0, len(rows), 16))
    return (sum_over_processes(accelerator, total) / accelerator.num_processes / len(rows)).item()


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
