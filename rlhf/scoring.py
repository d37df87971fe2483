"""Scores of completions, one number each, from any source (CANON S4): our reward model or an ensemble of them, a reward model with
another tokenizer (an encoder such as BERT too), a Python callable, or a weighted mix of these. Normalisation (R5) travels in the reward
model's config.json as reward_gain and reward_bias.
"""

import importlib
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf.contents import is_function
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.masking import WIDTH_STEP, length_mask, right_pad
from rlhf.models import hold_for_products, load_encoder, load_reward_model
from rlhf.passes import check_length, even_groups, pass_cost
from rlhf.workers import ALONE, Workers, callers_autocast

BUDGET = 16_384  # tokens in one pass

Scorer = Callable[[list[list[dict]], list[list[int]], Encoder], torch.Tensor]
"""f(prompts as messages, completions as ids of the policy's encoder, that encoder) -> scores_B, fp32 on the CPU."""


def raw_scores(reward_model, rows: list[list[int]], pad_id: int, budget: int = BUDGET, workers: Workers = ALONE) -> torch.Tensor:
    """[B] outputs of a sequence classifier for prompt + completion ids, not normalised, in the order given.

    A causal model answers at the last real token (CANON R2), an encoder where its architecture pools; padding is on the right. `workers` go
    through groups of rows side by side, under whatever autocast the caller opened. Raises InputError for rows longer than the model's table of
    positions.
    """
    if not rows:
        return torch.empty(0)
    check_length(reward_model, max(map(len, rows)))
    device = next(reward_model.parameters()).device
    autocast = callers_autocast(device.type)

    @torch.inference_mode()  # of the thread that runs it
    def scores_of(group: list[int]) -> torch.Tensor:
        ids_BT = right_pad([rows[i] for i in group], pad_id, WIDTH_STEP).to(device)
        mask_BT = length_mask([len(rows[i]) for i in group], ids_BT.shape[1]).to(device)
        with autocast():
            return reward_model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[:, 0].float().cpu()

    scores_B, groups = torch.empty(len(rows)), even_groups([len(r) for r in rows], budget, workers.count, pass_cost(reward_model))
    for group, scores in zip(groups, workers.map(scores_of, groups), strict=True):
        scores_B[group] = scores
    return scores_B


class RewardModelScorer:
    """Normalised scores of one reward model; text is decoded and encoded anew where its tokenizer differs from the policy's."""

    def __init__(self, reward_model, encoder: Encoder, workers: Workers = ALONE, budget: int = BUDGET):
        self.model, self.encoder, self.workers, self.budget = reward_model.eval(), encoder, workers, budget
        self.gain = getattr(reward_model.config, "reward_gain", 1.0)
        self.bias = getattr(reward_model.config, "reward_bias", 0.0)

    def __call__(self, prompts, completions, policy_encoder) -> torch.Tensor:
        same = policy_encoder.fingerprint() == self.encoder.fingerprint()
        # A reward model has learned what its output at an EOS means; at the end of an answer that was cut off it means nothing (CANON R2)
        rows = [self.encoder.prompt_ids(p) + (self.encoder.closed(c) if same else self.encoder.completion_ids(policy_encoder.decode(c)))
                for p, c in zip(prompts, completions, strict=True)]
        return self.gain * raw_scores(self.model, rows, self.encoder.pad_id, self.budget, self.workers) + self.bias


class EnsembleScorer:
    """Several reward models as one (CANON R7, Coste): their mean, the worst, or the mean less a price on their variance."""

    def __init__(self, members: list[Scorer], rule: str, uncertainty_coef: float):
        self.members, self.rule, self.uncertainty_coef = members, rule, uncertainty_coef

    def __call__(self, prompts, completions, policy_encoder) -> torch.Tensor:
        return combine(torch.stack([m(prompts, completions, policy_encoder) for m in self.members]), self.rule, self.uncertainty_coef)


def combine(scores_MB: torch.Tensor, rule: str, uncertainty_coef: float) -> torch.Tensor:
    """[B] from M members' scores: `mean`, `worst`, or `uncertainty` = mean - coefficient · variance (Coste eq. 2, 3; biased variance)."""
    if rule == "worst":
        return scores_MB.min(0).values
    mean_B = scores_MB.mean(0)
    return mean_B - uncertainty_coef * scores_MB.var(0, unbiased=False) if rule == "uncertainty" else mean_B


class MixScorer:
    """Weighted sum of several sources' scores, each on its own scale: a reward model's normalised, a callable's as it returns them."""

    def __init__(self, sources: list[tuple[float, Scorer]]):
        self.sources = sources

    def __call__(self, prompts, completions, policy_encoder) -> torch.Tensor:
        scores_SB = torch.stack([weight * scorer(prompts, completions, policy_encoder) for weight, scorer in self.sources])
        return scores_SB.sum(0)


def _imported(name: str, named: str) -> Callable:
    """The function at `name` (module:function), `named` in messages. Raises InputError when there is none."""
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"{named}: found no ':', wanted module:function")
    sys.path.insert(0, str(Path.cwd()))  # a module beside the user's config, as `python -m` would find it
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of the user's does while it is imported
        raise InputError(f"{named}: {type(error).__name__}: {error}; wanted a function importable from the working directory") from error


def _called(function: Callable, named: str, *arguments):
    """What a function of the user's returns. Raises InputError, with its file and line, for what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"{named}, which raised {type(error).__name__}: {error} ({last.filename}:{last.lineno}); wanted a number for every answer, "
                         "whatever it says") from error


class CallableScorer:
    """Scores by a Python function f(prompts, completions) -> list of float; prompts are the last user turns, both as text.

    `setting` is where `name` (module:function) was found, for messages. Raises InputError for what is not there or returns something else.
    """

    def __init__(self, name: str, setting: str = "ppo.score"):
        self.named = f"{setting} names {name!r}"
        self.function = _imported(name, self.named)

    def __call__(self, prompts, completions, policy_encoder) -> torch.Tensor:
        texts = [policy_encoder.decode(c) for c in completions]
        scores = _called(self.function, self.named, [p[-1]["content"] for p in prompts], texts)
        try:
            scores = [float(s) for s in scores]
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.named}, which returned {type(scores).__name__} ({error}); wanted a list of numbers") from None
        if len(scores) != len(texts):
            raise InputError(f"{self.named}, which returned {len(scores)} scores for {len(texts)} completions; wanted one each")
        return torch.tensor(scores)


class CallableJudge:
    """A judge of two answers by a Python function f(prompt, first, second), above 0 where the first is better, below 0 where the second is
    (`rlhf.comparison.verdicts`).

    The prompt is the last user turn; the same question is asked once. Raises InputError for what is not there or returns something else.
    """

    def __init__(self, name: str, setting: str = "compare.judge"):
        self.named = f"{setting} names {name!r}"
        self.function, self._said = _imported(name, self.named), {}

    def __call__(self, messages: list[dict], first: str, second: str) -> float:
        question = (messages[-1]["content"], first, second)
        if question not in self._said:
            answer = _called(self.function, self.named, *question)
            number = _as_number(answer)
            if not math.isfinite(number):
                raise InputError(f"{self.named}, which returned {answer!r}; wanted a number, above 0 where the first answer is better and below 0 "
                                 "where the second is")
            self._said[question] = number
        return self._said[question]


def _as_number(answer) -> float:
    """NaN for what is none, and for True and False: each would be a tie, as one order says the first and the other nobody."""
    if isinstance(answer, (str, bool)) or "bool" in str(getattr(answer, "dtype", "")):
        return math.nan
    try:
        return float(answer)
    except (TypeError, ValueError, RuntimeError):  # of an array or tensor of several numbers
        return math.nan


def member_folders(stage: Path, members: int) -> list[Path]:
    """Where the reward models of an ensemble lie below the reward stage's folder."""
    return [stage / ("model" if m == 0 else f"model_{m}") for m in range(members)]


def load_scorer(folders: list[Path], rule: str, uncertainty_coef: float, attention: str, device, trust_remote_code: bool = False,
                workers: Workers = ALONE, budget: int = BUDGET) -> Scorer:
    """The reward model at a folder, or an ensemble of several; `workers` and `budget` as in raw_scores.

    Loaded under an autocast they hold their weights in its dtype, and are then called under it (`rlhf.models.hold_for_products`).
    """
    scorers = []
    for folder in folders:
        encoder = load_encoder(str(folder), trust_remote_code)
        model = load_reward_model(str(folder), encoder, attention, trust_remote_code).to(device).requires_grad_(False)
        hold_for_products(model)
        scorers.append(RewardModelScorer(model, encoder, workers, budget))
    return scorers[0] if len(scorers) == 1 else EnsembleScorer(scorers, rule, uncertainty_coef)


def with_mix(scorer: Scorer, mix: dict[str, float], attention: str, device, trust_remote_code: bool = False) -> Scorer:
    """`scorer` with the sources of ppo.mix added at their weights; an empty mix leaves it as it is.

    A source is a folder or hub id of a reward model, or a callable's module:function. Raises InputError.
    """
    sources = [(1.0, scorer)]
    for name, weight in mix.items():
        is_callable = is_function(name)
        try:
            source = (CallableScorer(name, "ppo.mix") if is_callable else
                      load_scorer([Path(name)], "mean", 0.0, attention, device, trust_remote_code))
        except InputError as error:
            raise error if is_callable else InputError(f"ppo.mix names {name!r}, neither a module:function nor a reward model: {error}") from None
        sources.append((weight, source))
    return MixScorer(sources) if mix else scorer


def with_missing_eos(scores_B: torch.Tensor, ended: list[bool], missing_eos_score: float) -> torch.Tensor:
    """Completions that did not end get the fixed penalty score instead of theirs (CANON S2)."""
    return torch.where(torch.tensor(ended), scores_B, missing_eos_score)
