"""Bugs of the kind that RLHF code is known for, planted one at a time, to see that the tests go red.

    python -m tests.planted_bugs                 # all of them
    python -m tests.planted_bugs --sample 5      # some of them (--seed picks which)
    python -m tests.planted_bugs --only P3       # those of one code, or of one file

Each bug is a right line, a wrong one, what it breaks, and the test file that must notice. The tree is copied, the wrong line is put in, and
the tests of that file that are named after the bug's CANON code are run on the copy (all of its tests where the bug has no code). Caught
means that tests ran and one of them failed: a module that can no longer be imported does not count. The same tests are run once on the
copy without a bug, and must be green. Prints `N of N caught` last; exit code 0 when all are.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("rlhf", "stages", "tests", "configs", "data", "pyproject.toml")
PRELOADED = ("pytest", "hypothesis", "yaml", "torch", "transformers", "accelerate", "peft", "transformers.models.gpt2.modeling_gpt2",
             "transformers.models.llama.modeling_llama")
TESTS_FAILED = 1  # pytest's exit code when tests ran and some failed
LONGEST = 180  # seconds


@dataclass(frozen=True)
class Bug:
    """One line that could have been written."""

    code: str  # the CANON line it breaks, or "" for the contract of DESIGN
    file: str
    right: str
    wrong: str
    breaks: str
    test: str


BUGS = [
    # B: text
    Bug("B2", "rlhf/masking.py", "torch.where(mask, mask.long().cumsum(1) - 1, 0)", "torch.arange(mask.shape[1]).expand(mask.shape)",
        "position ids count the padding on the left", "test_masking.py"),
    Bug("B2", "rlhf/masking.py", "return length_mask(lengths).flip(1)", "return length_mask(lengths)",
        "the mask of left-padded prompts is that of right-padded ones", "test_masking.py"),
    Bug("B2", "rlhf/sampling.py", "positions(mask_BT[:, :width])", "torch.arange(width).expand(len(prompts), -1)",
        "the sampler's positions count padding: shorter prompts are sampled from elsewhere", "test_sampling.py"),
    Bug("B2", "rlhf/sampling.py", "position = position[:, -1:] + 1", "position = position[:, -1:]",
        "every sampled token stands at the prompt's last position", "test_sampling.py"),
    Bug("B2", "rlhf/encoding.py", "if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:",
        "if tokenizer.pad_token_id is not None:", "pad is EOS: the end of a completion is masked as padding", "test_encoding.py"),
    Bug("B3", "rlhf/encoding.py", "return self.text_ids(text) + [self.eos_id]", "return self.text_ids(text)",
        "completions have no EOS: stopping is never learned", "test_encoding.py"),
    Bug("B3", "rlhf/encoding.py", "split_special_tokens=True", "split_special_tokens=False",
        "a user's text forges turns and ends", "test_encoding.py"),
    Bug("B3", "rlhf/encoding.py", "end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)", "end = len(ids)",
        "what comes after EOS is read as text", "test_encoding.py"),
    Bug("B4", "rlhf/models.py", "return {name: 0.0 for name in DROPOUTS", "return {name: getattr(config, name) for name in DROPOUTS",
        "dropout stays on: old and new log-probabilities differ", "test_passes.py"),
    # R: reward model
    Bug("R1", "rlhf/rankings.py", "/ math.sqrt(head.in_features + 1))", "/ math.sqrt(2 * head.in_features))",
        "the reward head starts at another scale", "test_sft_reward.py"),
    Bug("R2", "rlhf/scoring.py", "reward_model(input_ids=ids_BT, attention_mask=mask_BT.long())", "reward_model(input_ids=ids_BT[:, :-1])",
        "the longest row's reward is read one before its EOS", "test_scoring.py"),
    Bug("R2", "rlhf/scoring.py", "scores_B[group] = ", "scores_B[sorted(group)] = ",
        "scores go to other completions than their own", "test_scoring.py"),
    Bug("R3", "rlhf/losses.py", "difference_BKK = difference_BKK - margin_B[:, None, None]", "difference_BKK = difference_BKK + margin_B[:, None, None]",
        "a margin makes the pair easier instead of harder", "test_losses.py"),
    Bug("R3", "rlhf/losses.py", "better_BKK = real_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :])",
        "better_BKK = real_BKK & (ranks_BK[:, :, None] > ranks_BK[:, None, :])", "the reward model learns to prefer the worse answer", "test_losses.py"),
    Bug("R3", "rlhf/losses.py", "-0.5 * (F.logsigmoid(plain_BKK) + F.logsigmoid(-plain_BKK))", "-1.0 * (F.logsigmoid(plain_BKK) + F.logsigmoid(-plain_BKK))",
        "a tie counts twice", "test_losses.py"),
    Bug("R4", "rlhf/losses.py", "(losses_BKK.sum((1, 2)) / pairs_B.clamp(min=1)).sum()", "losses_BKK.sum((1, 2)).sum()",
        "a prompt with many answers outweighs the others", "test_losses.py"),
    Bug("R4", "rlhf/losses.py", "real_BKK = (ranks_BK[:, :, None] > 0) & (ranks_BK[:, None, :] > 0)",
        "real_BKK = (ranks_BK[:, :, None] >= 0) & (ranks_BK[:, None, :] >= 0)", "empty places of the batch rank first", "test_losses.py"),
    Bug("R5", "rlhf/scoring.py", "return self.gain * raw_scores(", "return raw_scores(",
        "the reward model's normalisation is forgotten", "test_scoring.py"),
    Bug("R5", "rlhf/rankings.py", "return gain, -mean * gain", "return gain, -mean", "normalised scores do not have mean 0", "test_sft_reward.py"),
    Bug("R6", "rlhf/rankings.py", "return (difference_P > 0).double() + 0.5 * (difference_P == 0)", "return (difference_P >= 0).double()",
        "a reward model that says the same of everything is always right", "test_sft_reward.py"),
    Bug("R7", "rlhf/scoring.py", "return scores_MB.min(0).values", "return scores_MB.max(0).values", "worst-case is best-case", "test_scoring.py"),
    Bug("R7", "rlhf/scoring.py", "mean_B - uncertainty_coef * scores_MB.var(0, unbiased=False)", "mean_B + uncertainty_coef * scores_MB.var(0, unbiased=False)",
        "disagreement is rewarded", "test_scoring.py"),
    # S: rollouts
    Bug("S1", "rlhf/logprobs.py", "torch.log_softmax(logits_NV.float() / temperature, dim=-1)", "torch.log_softmax(logits_NV.float(), dim=-1)",
        "log-probabilities without the sampling temperature", "test_logprobs.py"),
    Bug("S1", "rlhf/sampling.py", "torch.softmax(logits_BV.float() / temperature, -1)", "torch.softmax(logits_BV.float(), -1)",
        "samples come from another policy than the one whose probabilities are used", "test_sampling.py"),
    Bug("S1", "rlhf/rollout.py", "logprobs_BC, entropy_BC, values_BC = model(batch, temperature)", "logprobs_BC, entropy_BC, values_BC = model(batch, 1.0)",
        "old log-probabilities at another temperature", "test_rollout.py"),
    Bug("S2", "rlhf/sampling.py", "going = going & (ids[:, 0] != encoder.eos_id)", "going = ids[:, 0] != encoder.eos_id",
        "rows that ended come back to life and stay in the batch", "test_sampling.py"),
    Bug("S2", "rlhf/sampling.py", "if not encoder.ended(completions[row]):", "if True:", "completions go on after their EOS", "test_sampling.py"),
    Bug("S2", "rlhf/scoring.py", "return torch.where(torch.tensor(ended), scores_B, missing_eos_score)", "return scores_B",
        "completions that do not end cost nothing", "test_scoring.py"),
    Bug("S3", "rlhf/advantages.py", "rewards_BC[rows, mask_BC.sum(1) - 1] += scores_B", "rewards_BC[:, -1] += scores_B",
        "the score lands in the last column, on padding", "test_advantages.py"),
    Bug("S3", "rlhf/advantages.py", "-kl_coef * (logprobs_BC - ref_logprobs_BC), 0.0)", "kl_coef * (logprobs_BC - ref_logprobs_BC), 0.0)",
        "KL is rewarded", "test_advantages.py"),
    Bug("S4", "rlhf/scoring.py", "(c if same else self.encoder.completion_ids(policy_encoder.decode(c)))", "c",
        "a reward model with another tokenizer reads the policy's ids", "test_scoring.py"),
    # P: PPO
    Bug("P1", "rlhf/advantages.py", "delta_B + gamma * lam * next_advantage_B", "delta_B + gamma * next_advantage_B", "lambda is always 1", "test_advantages.py"),
    Bug("P1", "rlhf/advantages.py", "next_value_B = values_BC[:, t]", "next_value_B = values_BC[:, -1]", "the next value is the last column's", "test_advantages.py"),
    Bug("P1", "rlhf/advantages.py", "torch.where(mask_BC, advantages_BC + values_BC, 0.0)", "torch.where(mask_BC, advantages_BC, 0.0)",
        "returns without the values", "test_advantages.py"),
    Bug("P2", "rlhf/advantages.py", "real = values[mask].double()", "real = values.nan_to_num().flatten().double()", "padding is whitened too", "test_advantages.py"),
    Bug("P2", "rlhf/advantages.py", "(whitened if shift_mean else whitened + mean)", "whitened", "reward whitening moves the mean", "test_advantages.py"),
    Bug("P2", "rlhf/rollout.py", "advantages_BC = whiten(advantages_BC, mask_BC, moments(advantages_BC, mask_BC))",
        "advantages_BC = advantages_BC * mask_BC", "advantages are not whitened", "test_rollout.py"),
    Bug("P2", "rlhf/rollout.py", "whiten(rewards_BC, mask_BC, moments(rewards_BC, mask_BC), shift_mean=False)",
        "whiten(rewards_BC, mask_BC, moments(rewards_BC, mask_BC))", "whitened rewards lose their mean", "test_rollout.py"),
    Bug("P3", "rlhf/losses.py", "torch.where(mask_BC, torch.maximum(plain_BC, clipped_BC), 0.0)", "torch.where(mask_BC, torch.minimum(plain_BC, clipped_BC), 0.0)",
        "the optimistic side of the clip", "test_losses.py"),
    Bug("P3", "rlhf/losses.py", "plain_BC = -advantages_BC * ratio_BC", "plain_BC = advantages_BC * ratio_BC", "good tokens are made less likely", "test_losses.py"),
    Bug("P3", "rlhf/losses.py", "torch.exp(torch.where(mask_BC, logprobs_BC - old_logprobs_BC, 0.0))",
        "torch.exp(torch.where(mask_BC, old_logprobs_BC - logprobs_BC, 0.0))", "the ratio upside down", "test_losses.py"),
    Bug("P3", "rlhf/losses.py", "held_BC = old_values_BC + (values_BC - old_values_BC).clamp(-clip, clip)", "held_BC = values_BC.clamp(-clip, clip)",
        "values are clipped around 0 instead of the old values", "test_losses.py"),
    Bug("P3", "rlhf/ppo.py", "return settings.policy_coef * policy_sum + settings.value_coef * value_sum", "return settings.policy_coef * policy_sum + value_sum",
        "the value loss has weight 1", "test_ppo.py"),
    Bug("P3", "rlhf/ppo.py", "policy_loss(logprobs_BC, old_BC, advantages_BC, batch.mask_BC, settings.clip)",
        "policy_loss(logprobs_BC, logprobs_BC.detach(), advantages_BC, batch.mask_BC, settings.clip)", "nothing is ever clipped", "test_ppo.py"),
    Bug("P4", "rlhf/ppo.py", "accelerator.backward(loss * accelerator.num_processes / count)",
        "accelerator.backward(loss * accelerator.num_processes / figures[SUMS.index('tokens')] / len(groups))", "the mean of microbatch means", "test_ppo.py"),
    Bug("P4", "rlhf/ppo.py", "[mine[i] for i in group]", "group", "microbatches take other rows than their minibatch's", "test_ppo.py"),
    Bug("P5", "rlhf/ppo.py", "order = torch.randperm(len(rollout.prompts), generator=generator).tolist()", "order = list(range(len(rollout.prompts)))",
        "every epoch has the same minibatches", "test_ppo.py"),
    Bug("P5", "rlhf/optimizers.py", "return (steps - step) / max(1, steps - rising)", "return 1.0", "the learning rate never falls", "test_ppo.py"),
    Bug("P5", "rlhf/optimizers.py", "lr=lr, betas=betas, eps=eps, fused=True)", "lr=lr, betas=betas, fused=True)", "Adam's epsilon is torch's 1e-8", "test_ppo.py"),
    Bug("P5", "rlhf/ppo.py", "norms.append(float(accelerator.clip_grad_norm_(parameters, max_norm)))",
        "norms.append(float(accelerator.clip_grad_norm_(parameters, math.inf)))", "gradients are not clipped", "test_ppo.py"),
    Bug("P6", "rlhf/passes.py", "row * width + len(p) - 1 + t", "row * width + len(p) + t", "a value stands behind its token instead of before it", "test_passes.py"),
    Bug("P6", "rlhf/value.py", "head.weight.copy_(reward_model.score.weight * gain)", "head.weight.copy_(reward_model.score.weight)",
        "values start in raw scores while rewards are normalised", "test_ppo.py"),
    Bug("P7", "rlhf/kl.py", "return kl_coef * (1.0 + error * completions / horizon)", "return kl_coef * (1.0 - error * completions / horizon)",
        "the KL coefficient runs away from its target", "test_kl.py"),
    Bug("P7", "rlhf/kl.py", "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0", "the controller's error is not held", "test_kl.py"),
    Bug("P8", "rlhf/kl.py", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs", "k3 of the wrong direction, biased", "test_kl.py"),
    Bug("P8", "rlhf/kl.py", "    return logprobs - ref_logprobs", "    return (logprobs - ref_logprobs).abs()", "k1 without its sign", "test_kl.py"),
    Bug("P9", "rlhf/ppo.py", "settings.ptx_coef * loss * accelerator.num_processes / ptx_count", "loss * accelerator.num_processes / ptx_count",
        "the weight of PPO-ptx is ignored", "test_ppo.py"),
    Bug("P9", "rlhf/ppo.py", "ptx_rows[i :: settings.epochs * settings.minibatches]", "ptx_rows[:0]", "PPO-ptx learns from nothing", "test_ppo.py"),
    Bug("P10", "rlhf/ppo.py", "self.average[name].lerp_(p, 1 - self.decay)", "self.average[name].lerp_(p, self.decay)",
        "the average is nearly the last weights", "test_ppo.py"),
    Bug("P11", "rlhf/ppo.py", "sum(epoch_kl) / len(epoch_kl) > settings.target_kl", "sum(epoch_kl) / len(epoch_kl) < settings.target_kl",
        "epochs stop while the policy is near and go on when it is far", "test_ppo.py"),
    Bug("P12", "rlhf/rollout.py", "with torch.no_grad(), autocast(), policy.disable_adapter():", "with torch.no_grad(), autocast():",
        "with LoRA the reference is the policy itself", "test_rollout.py"),
    Bug("P12", "rlhf/checkpoints.py", "accelerator.load_state(str(found[-1]))", "accelerator.load_state(str(found[0]))",
        "a run goes on from its oldest checkpoint", "test_ppo.py"),
    # A: alarms
    Bug("A1", "rlhf/ppo.py", "largest_error = torch.maximum(largest_error, error)", "largest_error = largest_error + error",
        "the alarm on ratios adds up over microbatches", "test_ppo.py"),
    Bug("A3", "rlhf/passes.py", "if not all(completions):", "if not completions:", "a completion without tokens passes", "test_passes.py"),
    Bug("A4", "rlhf/losses.py", "rewards_BK = torch.where(ranks_BK > 0, rewards_BK, 0.0)", "rewards_BK = rewards_BK * 1.0",
        "NaN in an empty place reaches the gradient", "test_losses.py"),
    Bug("A4", "rlhf/losses.py", "values_BC, old_values_BC, returns_BC = (torch.where(mask_BC, t, 0.0) for t in (values_BC, old_values_BC, returns_BC))",
        "values_BC, old_values_BC, returns_BC = (t * mask_BC for t in (values_BC, old_values_BC, returns_BC))", "NaN times a mask is NaN", "test_losses.py"),
    Bug("A4", "rlhf/ppo.py", "if math.isfinite(norm):", "if True:", "a NaN gradient reaches the weights", "test_ppo.py"),
    # the contract
    Bug("", "rlhf/runs.py", "if old.get(\"fingerprint\") == stage._manifest[\"fingerprint\"]:", "if old:", "another experiment is mixed into a folder", "test_runs.py"),
    Bug("", "rlhf/runs.py", "if not done.is_file():", "if not done.parent.is_dir():", "a stage starts from a parent that did not finish", "test_runs.py"),
    Bug("", "rlhf/config.py", "if key not in hints:", "if not prefix and key not in hints:", "a mistyped setting is ignored", "test_config.py"),
    Bug("", "rlhf/jsonl.py", "    os.replace(beside, path)\n\n\n@contextmanager", "    shutil.copy(beside, path)\n\n\n@contextmanager",
        "a file is overwritten in place, and half of it may stay", "test_runs.py"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="plant only this many, picked by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="plant only the bugs of this code or file")
    arguments = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if arguments.only in (None, bug.code, bug.file)]
    if arguments.sample:
        bugs = random.Random(arguments.seed).sample(bugs, min(arguments.sample, len(bugs)))
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        scratch = _copy_of_tree(Path(folder) / "tree")
        if not _green_without_bugs(scratch, bugs):
            return 1
        caught = sum([_plant(scratch, bug) for bug in bugs])
    print(f"{caught} of {len(bugs)} caught")
    return 0 if caught == len(bugs) else 1


def _plant(scratch: Path, bug: Bug) -> bool:
    """Puts the wrong line in, runs the tests, takes it out again; True when a test failed."""
    path, began = scratch / bug.file, time.perf_counter()
    text = path.read_text(encoding="utf-8")
    if text.count(bug.right) != 1:
        print(f"MISSED  {bug.code:4} {bug.file}: the right line stands there {text.count(bug.right)} times: {bug.right}", flush=True)
        return False
    path.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    code, output = _run(scratch, bug.test, f"_{bug.code}_" if bug.code else "")
    path.write_text(text, encoding="utf-8")
    red = re.search(r"FAILED (\S+)", output)
    how = red[1].partition("::")[2] if red else "did not end" if code is None else f"pytest ended with {code}"
    caught = code in (TESTS_FAILED, None)
    print(f"{'caught' if caught else 'MISSED'}  {bug.code:4} {bug.file}: {bug.breaks}  ({bug.test}: {how}, {time.perf_counter() - began:.1f} s)", flush=True)
    if not caught:
        print(output[-1500:])
    return caught


def _green_without_bugs(scratch: Path, bugs: list[Bug]) -> bool:
    """True when the tests that the bugs name pass on the tree as it is: what is red anyway catches nothing."""
    green = True
    for test in sorted({bug.test for bug in bugs}):
        codes = {bug.code for bug in bugs if bug.test == test}
        code, output = _run(scratch, test, "" if "" in codes else " or ".join(f"_{c}_" for c in sorted(codes)))
        if code != 0:
            print(f"{test} is not green without a bug (pytest ended with {code}):\n{output[-1500:]}")
            green = False
    return green


def _run(scratch: Path, test: str, names: str) -> tuple[int | None, str]:
    """(pytest's exit code, its output) of a test file in a process of its own, or (None, ...) when it had to be stopped."""
    log = scratch.parent / "log.txt"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(scratch, log, [f"tests/{test}", *(["-k", names] if names else [])]))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
        return None, ""
    return process.exitcode, log.read_text(encoding="utf-8")


def _child(scratch: Path, log: Path, words: list[str]) -> None:
    """Runs pytest on the copy; the modules of the tree itself are not to be found."""
    sys.dont_write_bytecode = True  # a wrong line as long as the right one, written in the same second, would meet a stale cache
    os.chdir(scratch)
    sys.path[:] = [str(scratch), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("rlhf", "stages", "tests")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    import pytest

    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = int(pytest.main([*words, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(scratch)]))
    os._exit(code)


def _copy_of_tree(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif source.is_file():
            shutil.copy(source, target / name)
    return target


def _preload() -> None:
    """The large libraries, once for all processes: each would spend most of its time on importing them."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
