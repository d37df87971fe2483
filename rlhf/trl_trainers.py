"""TRL's SFTTrainer and RewardTrainer, fed ids made by our encoder; the one file that imports the project's trl (rlhf/bench_peer.py imports another).

What is ours in them: the loss (a sum divided once over the optimizer step and all processes), the order of the rows (a function of seed and
lengths alone, so that microbatches, processes and resumes change nothing but rounding), whole checkpoints, and where figures go.
"""

import contextlib
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.compute import average_gradients, on_cpu, sharded, sum_over_processes
from rlhf.config import Run
from rlhf.encoded import EncodedRows
from rlhf.encoding import Encoder
from rlhf.errors import SKIPS_IN_A_ROW, InputError, TrainingStopped
from rlhf.losses import ranking_loss
from rlhf.masking import length_mask
from rlhf.memory import Microbatch
from rlhf.models import unwrapped
from rlhf.passes import Rows, make_rows, policy_pass
from rlhf.progress import Progress, say
from rlhf.rankings import collate_rankings, pair_figures
from rlhf.runs import Stage
from rlhf.shared_prompts import can_share, collate_shared, pays, shared_rewards
from rlhf.workers import accumulate, workers_for

WARMUP = 0.03  # share of the steps in which the learning rate rises
SORTED_STEPS = 16  # steps whose rows are sorted by length together: 6 % of the quickstart's tokens are padding (1 step: 47 %, 50 steps: 2 %)
# Rows times the square of the longest one's tokens in a pass on CPUs: attention's memory grows with it, and the system kills a process that takes
# too much instead of saying so. With it SmolLM2 takes 7 GB instead of 20 on OASST's rankings of up to nine answers (configs/EXPERIMENTS.md)
MOST_CELLS = 4 * 1024**2
WHOLE = "trainer_state.json"  # the file that transformers writes last


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one of the trainers trains; `section` names its settings in messages."""

    section: str
    steps: int
    batch_size: int  # rows in an optimizer step, all processes together
    microbatch: int  # rows in memory at once, per process
    lr: float
    schedule: str  # cosine or linear, to 0
    seed: int
    precision: str  # bf16 or no


def count_steps(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over `rows`: to the nearest, at least one."""
    return max(1, round(epochs * rows / batch_size))


def length_grouped_order(lengths: list[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Row indices of all steps one after the other: a new permutation for every pass, rows of like length brought together within a few steps.

    Inside a step rows go from short to long, so that microbatches have little padding too; the steps themselves are shuffled.
    """
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(lengths), generator=generator).tolist()
    grouped = []
    for start in range(0, steps * batch_size, SORTED_STEPS * batch_size):
        window = sorted(order[start : min(start + SORTED_STEPS * batch_size, steps * batch_size)], key=lambda i: lengths[i])
        for b in torch.randperm(len(window) // batch_size, generator=generator).tolist():
            grouped += window[b * batch_size : (b + 1) * batch_size]
    return grouped


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The latest whole checkpoint of a trainer and its step; (None, 0) when there is none."""
    whole = sorted((int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file())
    return (whole[-1][1], whole[-1][0]) if whole else (None, 0)


def _arguments(kind, recipe: Recipe, run: Run, folder: Path, **more):
    """TRL's arguments for a recipe. Raises InputError when the batch cannot be shared out."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share, left = divmod(recipe.batch_size, processes)
    microbatch = min(recipe.microbatch, share)
    if left or share % microbatch:
        raise InputError(f"{recipe.section}.batch_size={recipe.batch_size} is not a multiple of {recipe.section}.microbatch={microbatch} x "
                         f"{processes} process{'es' * (processes > 1)}; change one of them")
    # transformers 5.20 knows the old name alone, 5.23 warns about it
    checkpointing = "activation_checkpointing" if hasattr(kind, "activation_checkpointing") else "gradient_checkpointing"
    arguments = kind(
        output_dir=str(folder), seed=recipe.seed % 2**32, max_steps=recipe.steps, per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=share // microbatch, learning_rate=recipe.lr, lr_scheduler_type=recipe.schedule,
        warmup_steps=int(WARMUP * recipe.steps), optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, bf16=recipe.precision == "bf16",
        use_cpu=on_cpu(), train_sampling_strategy="sequential", remove_unused_columns=False,
        dataloader_num_workers=0, dataloader_pin_memory=not on_cpu(), ddp_broadcast_buffers=False, save_strategy="steps",
        save_steps=run.save_every, logging_steps=1, logging_nan_inf_filter=False, report_to=[], disable_tqdm=True, max_length=None,
        **{checkpointing: False}, **more)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: more of them are accelerate's business
    return arguments


class _StageTrainer:
    """What both trainers do our way: order, figures, checkpoints. Subclasses say how rows become a batch and what its loss is."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole optimizer step

    def follow(self, stage: Stage, keep: int, label: str, offset: int = 0, ids: Sequence[str] = (), **figures) -> None:
        """Logs into `stage` with `offset` added to the step and `figures` added to each line; keeps `keep` checkpoints; `ids` name the rows."""
        self.stage, self.keep, self.label, self.offset, self.ids, self.fixed_figures = stage, keep, label, offset, ids, figures
        self.skipped, self.skips_in_a_row = False, 0
        self.microbatch = Microbatch(self.args.per_device_train_batch_size, f"{self.section}.microbatch", "rows")
        self.workers = workers_for(self.accelerator, self.model)
        self.sums: dict[str, torch.Tensor | int] = {}
        self.remove_callback(PrinterCallback)

    def run(self) -> None:
        """Trains to the end, from the last whole checkpoint where there is one; the stage has forgotten what was logged after it.

        Raises TrainingStopped.
        """
        checkpoint, first = last_checkpoint(Path(self.args.output_dir))
        if self.stage.main:
            shutil.rmtree(self._get_output_dir(), ignore_errors=True)
        self.clock = time.perf_counter()
        with Progress(self.label, self.args.max_steps, first) as self.bar:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Gradients of a microbatch. When memory runs out, it and those before it in the optimizer step are taken anew by halves (CANON P4)."""
        places = inputs.pop("places").tolist()
        self.taken.append(places)
        tries = 0

        def attempt(rows: int):
            nonlocal tries
            tries += 1
            if tries > 1:  # what the earlier microbatches left behind goes with what the failed try did
                self.sums = {}
                model.zero_grad()
            parts = [part for taken in (self.taken if tries > 1 else [places]) for part in self._parts(taken, rows)]
            if self.workers.count > 1:
                return sum(self._side_by_side(model, part, num_items_in_batch) for part in parts)
            batches = [inputs] if parts == [places] else map(self._batch, parts)
            return sum(super(_StageTrainer, self).training_step(model, batch, num_items_in_batch) for batch in batches)

        in_parts = sharded(self.accelerator)
        with contextlib.nullcontext() if in_parts else self.accelerator.no_sync(model):
            loss = self.microbatch.attempt(attempt, 1, in_parts)
        if self.accelerator.sync_gradients:  # the last microbatch of the step
            average_gradients(self.accelerator, model)
        return loss

    def _parts(self, places: list[int], rows: int) -> list[list[int]]:
        """`places` in runs of at most `rows`, and on CPUs of at most MOST_CELLS where that leaves a row (`lengths`: tokens of each)."""
        parts, most = [], MOST_CELLS if on_cpu() else math.inf
        for place in places:
            part = [*parts[-1], place] if parts else []
            if part and len(part) <= rows and len(part) * max(self.lengths[i] for i in part) ** 2 <= most:
                parts[-1] = part
            else:
                parts.append([place])
        return parts

    def _side_by_side(self, model, places: list[int], num_items_in_batch) -> torch.Tensor:
        """`training_step` of a microbatch whose rows are shared out among the workers, so that each gets long and short ones."""
        model.train()
        parts = [part for first in range(self.workers.count) if (part := places[first :: self.workers.count])]

        def loss_of(part):
            loss, sums = self.loss_and_sums(model, self._batch(part), num_items_in_batch)
            return loss, (loss.detach(), sums)

        losses, sums = zip(*accumulate(self.accelerator, self.workers, model, [functools.partial(loss_of, part) for part in parts]), strict=True)
        for one in sums:
            self.add_up(**one)
        return sum(losses)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a microbatch, its share of the step's; gradients' mean over processes is undone."""
        loss, sums = self.loss_and_sums(model, inputs, num_items_in_batch)
        self.add_up(**sums)
        return loss

    def _batch(self, places: list[int]) -> dict:
        batch = self.data_collator([{"row": place} for place in places])
        return {name: part for name, part in batch.items() if name != "places"}

    def add_up(self, **sums) -> None:
        """Adds to the sums of this step and process, from which `figures` is made when the step ends."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step from the sums over its microbatches and all processes."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """In place of the trainers' own: a line of metrics.jsonl for every step."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if "loss" not in logs:
            return  # the closing summary
        totals = sum_over_processes(self.accelerator, torch.stack([torch.as_tensor(v, device=self.args.device).double() for v in self.sums.values()]))
        sums, self.sums = dict(zip(self.sums, totals.tolist(), strict=True)), {}
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        loss, grad_norm, step = sums["loss"], logs["grad_norm"], self.state.global_step  # a NaN would stay in the trainers' own loss
        self.skips_in_a_row = self.skips_in_a_row + 1 if self.skipped else 0
        if self.skipped:
            self._tell_skip(step, loss)
        figures = {"loss": loss, **self.figures(sums), **({"skipped_steps": 1} if self.skipped else {})}
        self.stage.log(self.offset + step, **figures, **self.fixed_figures, lr=logs["learning_rate"], grad_norm=grad_norm, seconds=seconds,
                       tokens_per_second=sums["tokens"] / seconds)
        self.bar.update(step, **figures, tokens_per_second=int(sums["tokens"] / seconds))

    def _clip_grad_norm(self, model):
        """A step whose loss or gradient is not finite leaves weights and optimizer as they are: without gradients AdamW does nothing (CANON A4)."""
        norm = super()._clip_grad_norm(model)
        loss = sum_over_processes(self.accelerator, self.sums["loss"].clone())
        self.skipped = not (math.isfinite(norm) and math.isfinite(loss))
        if self.skipped:
            model.zero_grad(set_to_none=True)
        return norm

    def _tell_skip(self, step: int, loss: float) -> None:
        """Says which prompts a step that was left out had. Raises TrainingStopped after several in a row."""
        size = len(self.train_dataset) // self.args.max_steps
        prompts = ", ".join(str(self.ids[i]) for i in self.train_dataset[(step - 1) * size : step * size]["row"]) if self.ids else "unknown"
        told = f"loss ({loss}) or gradient of step {step} is not finite; its prompts have the ids {prompts}"
        if self.skips_in_a_row >= min(SKIPS_IN_A_ROW, self.args.max_steps):
            raise TrainingStopped(f"{self.label}: {told}. That makes {self.skips_in_a_row} such steps in a row; none of them changed the weights, "
                                  f"and the last checkpoint is in {self.args.output_dir}. Lower {self.section}.lr, now "
                                  f"{self.args.learning_rate}, or look at the data")
        say(f"{self.label}: {told}; the step was left out")

    def _count_items(self, counts: torch.Tensor) -> torch.Tensor:
        self.taken: list[list[int]] = []  # an optimizer step begins: the rows of its microbatches so far
        return sum_over_processes(self.accelerator, counts.to(self.args.device))

    def _get_output_dir(self, trial=None) -> str:
        return str(Path(self.args.output_dir) / "partial")

    def _save_checkpoint(self, model, trial) -> None:
        """Written beside; renamed, and older ones removed, when every process has written its part."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.stage.main:
            folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(folder / "partial" / name, folder / name)
            older = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            for path in older[: -self.keep]:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs) -> None:
        """None: the run folder explains itself."""

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""


def _lengths(rows: Sequence, tokens: Callable) -> list[int]:
    """Tokens of each row; those of a table are known, which spares reading all of it."""
    return rows.lengths.tolist() if isinstance(rows, EncodedRows) else [tokens(row) for row in rows]


def _ordered(lengths: list[int], recipe: Recipe) -> Dataset:
    """The whole run's order as the dataset that TRL wants; the collator looks the rows up."""
    return Dataset.from_dict({"row": length_grouped_order(lengths, recipe.batch_size, recipe.steps, recipe.seed)})


class DemonstrationTrainer(_StageTrainer, SFTTrainer):
    """SFT on (prompt ids, completion ids): mean loss over the completions' tokens, plus a weight times that over the prompts' (CANON B5)."""

    def __init__(self, policy, demonstrations: Sequence[tuple[list[int], list[int]]], encoder: Encoder, recipe: Recipe, run: Run, folder: Path,
                 lm_loss_weight: float = 0.0):
        self.section, self.lm_loss_weight = recipe.section, lm_loss_weight
        self.lengths = _lengths(demonstrations, lambda pair: len(pair[0]) + len(pair[1]))
        collate = functools.partial(_collate_demonstrations, pad_id=encoder.pad_id, with_prompts=lm_loss_weight > 0)
        super().__init__(
            policy, args=_arguments(SFTConfig, recipe, run, folder, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=_ordered(self.lengths, recipe), processing_class=encoder.tokenizer,
            data_collator=_looked_up(demonstrations, collate))
        # TRL's fused head runs the output layer on prompts and padding too where there is no Triton: about 1.5 times the time of a step on CPUs
        _teach(policy, "rows", lambda inner, rows: policy_pass(inner, rows, 1.0)[0])

    def loss_and_sums(self, model, inputs, num_items_in_batch):
        """Sum over this microbatch's tokens of -log p over the count of the whole step."""
        batch = dict(inputs)
        tokens, in_prompt_BC = batch.pop("tokens"), batch.pop("in_prompt_BC")
        rows = Rows(**batch)
        logprobs_BC = model(rows=rows)
        completion_tokens, prompt_tokens = num_items_in_batch
        loss = -torch.where(in_prompt_BC, 0.0, logprobs_BC).sum() / completion_tokens
        if self.lm_loss_weight:
            loss = loss - self.lm_loss_weight * torch.where(in_prompt_BC, logprobs_BC, 0.0).sum() / prompt_tokens.clamp(min=1)
        return loss * self.accelerator.num_processes, {"tokens": tokens, "loss": loss.detach()}

    def _get_num_items_in_batch(self, batches, device):
        """[2]: completion tokens and prompt tokens of the optimizer step, all processes together."""
        prompts = sum(b["in_prompt_BC"].sum() for b in batches)
        return self._count_items(torch.stack([sum(b["mask_BC"].sum() for b in batches) - prompts, prompts]))


class RankingTrainer(_StageTrainer, RewardTrainer):
    """The reward model on rankings of K answers: each answer through the model once, a prompt's pairs as one element (CANON R3, R4)."""

    def __init__(self, reward_model, rankings: Sequence[dict], encoder: Encoder, recipe: Recipe, run: Run, folder: Path, ties: str = "drop"):
        self.section, self.ties = recipe.section, ties
        self.lengths = _lengths(rankings, lambda row: row["length"])
        super().__init__(
            reward_model, args=_arguments(RewardConfig, recipe, run, folder), train_dataset=_ordered(self.lengths, recipe),
            processing_class=encoder.tokenizer, data_collator=_looked_up(rankings, _rankings_collator(reward_model, encoder.pad_id)))
        _teach(reward_model, "shared", shared_rewards)

    def loss_and_sums(self, model, inputs, num_items_in_batch):
        """Sum over this microbatch's prompts of their mean pair loss over the prompts of the whole step."""
        ranks_BK = inputs["ranks_BK"]
        if "shared" in inputs:
            rewards_BK = model(shared=inputs["shared"])
        else:
            rewards_BK = model(input_ids=inputs["ids_NT"], attention_mask=inputs["mask_NT"].long()).logits[:, 0].float()[inputs["places_BK"]]
        loss, _ = ranking_loss(rewards_BK, ranks_BK, inputs["margin_B"], self.ties)
        right, pairs, gap = pair_figures(rewards_BK.detach(), ranks_BK)
        loss = loss / num_items_in_batch
        sums = {"tokens": inputs["tokens"], "right": right, "pairs": pairs, "gap": gap, "loss": loss.detach()}
        return loss * self.accelerator.num_processes, sums

    def figures(self, sums):
        pairs = max(sums["pairs"], 1.0)
        return {"accuracy": sums["right"] / pairs, "reward_gap": sums["gap"] / pairs}

    def _get_num_items_in_batch(self, batches, device):
        """Prompts of the optimizer step, all processes together; each has a pair."""
        return self._count_items(torch.tensor(sum(len(b["ranks_BK"]) for b in batches)))

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # TRL would look for chosen and rejected texts


def _looked_up(rows: Sequence, collate: Callable[[list], dict]) -> Callable[[list[dict]], dict]:
    """A collator of row numbers: the batch of those rows, and their numbers as "places"."""
    def batch(picked: list[dict]) -> dict:
        places = [p["row"] for p in picked]
        return {**collate([rows[place] for place in places]), "places": torch.tensor(places)}

    return batch


def _collate_demonstrations(rows: list[tuple[list[int], list[int]]], pad_id: int, with_prompts: bool) -> dict:
    """The fields of `Rows`, and in_prompt_BC: True where a predicted token is the prompt's (nowhere unless `with_prompts`)."""
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    if with_prompts:  # everything after the first token is predicted
        batch = vars(make_rows([p[:1] for p in prompts], [p[1:] + c for p, c in rows], pad_id, "cpu"))
        in_prompt_BC = length_mask([len(p) - 1 for p in prompts], batch["mask_BC"].shape[1])
    else:
        batch = vars(make_rows(prompts, completions, pad_id, "cpu"))
        in_prompt_BC = torch.zeros_like(batch["mask_BC"])
    return {**batch, "in_prompt_BC": in_prompt_BC, "tokens": sum(len(p) + len(c) for p, c in rows)}


def _rankings_collator(reward_model, pad_id: int) -> Callable[[list[dict]], dict]:
    """Prompts read once for all their answers wherever the model allows it and it saves time."""
    inner = unwrapped(reward_model)
    shares, size = can_share(inner, pad_id), getattr(inner.config.get_text_config(), "hidden_size", 0)
    return lambda rows: collate_shared(rows, pad_id) if shares and pays(rows, size) else collate_rankings(rows, pad_id)


def _teach(model, name: str, answer: Callable) -> None:
    """Makes `model(name=x)` return answer(model, x), inside whatever wraps the model (autocast, DDP, FSDP)."""
    inner = unwrapped(model)
    plain = inner.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return answer(inner, kwargs[name]) if name in kwargs else plain(*args, **kwargs)

    inner.forward = forward
