"""The peer of `rlhf bench --peer DIR`: PPO by TRL 1.12, the last release that had it, one step for every line that it is sent.

    PYTHONPATH=DIR python -m rlhf.bench_peer      # started by rlhf/bench.py; DIR holds trl 1.12

The first line on standard input is the work as JSON (rlhf/bench.py: peer_work); every line after it asks for one step, and is answered by one
line of JSON: {"seconds", "cpu_seconds": of the step, "score_mean": of its completions, "peak_memory_mb": MiB so far}. At the end of the input it
ends.
TRL's own way is kept: samples and rollout passes in fp32, autocast only around the update's forward pass, the attention kernel that
`transformers` chooses. It takes an optimizer step after each minibatch, as ours does: its microbatch is therefore set to the whole batch, of which
it never sees more than a minibatch at once.
"""

import json
import os
import sys
import tempfile
import time

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf.compute import peak_memory_mb, synchronize

ROLLOUT_ROWS = 64  # rows that TRL samples and evaluates at once: its default


class Turns(TrainerCallback):
    """Waits for a line before each step, and answers it with the step's figures."""

    def __init__(self, answers):
        self.answers, self.score_mean = answers, None

    def on_train_begin(self, args, state, control, **kwargs):
        self._wait()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.score_mean = (logs or {}).get("objective/scores", self.score_mean)

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(args.device)
        figures = {"seconds": time.perf_counter() - self.began, "cpu_seconds": time.process_time() - self.cpu_began,
                   "score_mean": self.score_mean, "peak_memory_mb": peak_memory_mb()}
        print(json.dumps(figures), file=self.answers, flush=True)
        self._wait()

    def _wait(self):
        if not sys.stdin.readline():
            sys.exit()  # nobody asks any more
        self.began, self.cpu_began = time.perf_counter(), time.process_time()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    work = json.loads(sys.stdin.readline())
    torch.set_num_threads(work["threads"])
    with tempfile.TemporaryDirectory() as folder:
        new_trainer(work, folder, Turns(answers)).train()


def new_trainer(work: dict, folder: str, turns: Turns) -> PPOTrainer:
    """A trainer that meets the prompts of `work` in their order, a batch a step."""
    tokenizer = AutoTokenizer.from_pretrained(work["policy"], padding_side="left")
    policy, ref_policy = (AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32) for _ in range(2))
    reward_model, value_model = (scorer(work) for _ in range(2))
    data = Dataset.from_dict({"input_ids": work["prompts"]})
    config = PPOConfig(
        output_dir=folder, seed=work["seed"], use_cpu=not torch.cuda.is_available(), bf16=work["bf16"],
        per_device_train_batch_size=work["batch_size"],
        gradient_accumulation_steps=1, total_episodes=len(data), local_rollout_forward_batch_size=ROLLOUT_ROWS, lr_scheduler_type="constant",
        stop_token="eos", gradient_checkpointing=False, num_sample_generations=0, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, **work["settings"])
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=ref_policy, reward_model=reward_model,
                         value_model=value_model, train_dataset=data, eval_dataset=data.select([0]), callbacks=[turns])
    in_order = DataLoader(data, batch_size=work["batch_size"], collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def scorer(work: dict):
    """The reward model with its normalisation folded into the head, so that both sides learn from the same scores."""
    model = AutoModelForSequenceClassification.from_pretrained(work["reward"], num_labels=1, dtype=torch.float32)
    gain, bias = getattr(model.config, "reward_gain", 1.0), getattr(model.config, "reward_bias", 0.0)
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight * gain)
        head.bias.fill_(bias + (0.0 if model.score.bias is None else gain * model.score.bias.item()))
    model.score = head
    return model


if __name__ == "__main__":
    main()
