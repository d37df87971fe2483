"""How far a rule that understands nothing gets on preferences: "the longer answer wins", and a bag of words.

A reward model has to beat both. Where either is nearly always right, the labels leak through something that is not quality.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from rlhf.data.wording import words_and_marks
from rlhf.rankings import clustered_interval

FOLDS = 5
MIN_PROMPTS = 20  # below, held-out prompts are too few to say anything
MIN_TEXTS = 3  # a word in fewer answers is left out
MAX_WORDS = 20_000  # the most frequent ones
WORD_SCALE = 0.1  # standard deviation of the prior of a word's weight, in nats
TOP_WORDS = 12


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs ordered right (equal: half), its 95 % interval with the pairs of a prompt as one draw, and how many pairs there were."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class BagOfWords:
    """The accuracy on prompts that were held out, and the words with the largest weights for and against, fitted on all pairs."""

    accuracy: Accuracy
    good: list[str]
    bad: list[str]


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to the prompt whose id (16 hexadecimal digits) is `prompt`."""

    prompt: str
    better: str
    worse: str


def accuracy(margins: Sequence[float], prompts: Sequence[str]) -> Accuracy:
    """Of pairs with a rule's margin (above 0: the better answer is preferred) and their prompts' ids; at least one pair."""
    margin_P = torch.as_tensor(margins, dtype=torch.double)
    right_P = (margin_P > 0).double() + 0.5 * (margin_P == 0)
    low, high = clustered_interval(right_P, torch.tensor([int(name, 16) >> 1 for name in prompts]))
    return Accuracy(right_P.mean().item(), low, high, len(right_P))


def longer_wins(better: Sequence[int], worse: Sequence[int], prompts: Sequence[str]) -> Accuracy:
    """How often the better answer is the longer one; lengths in any unit."""
    return accuracy([a - b for a, b in zip(better, worse, strict=True)], prompts)


def bag_of_words(pairs: Sequence[Pair]) -> BagOfWords | None:
    """A Bradley-Terry model whose reward is a weight for each word that an answer has, cross-validated by prompt; None below MIN_PROMPTS.

    Features: words and punctuation (present or not), and how the answer ends. Fold of a pair: its prompt's id modulo FOLDS, so that no prompt
    is both learned from and asked.
    """
    if len({pair.prompt for pair in pairs}) < MIN_PROMPTS:
        return None
    rows, places = _rows(pairs)
    words = list(places)
    fold_P = torch.tensor([int(pair.prompt, 16) % FOLDS for pair in pairs])
    margin_P = torch.zeros(len(pairs), dtype=torch.double)
    for fold in range(FOLDS):
        held = (fold_P == fold).nonzero().flatten().tolist()
        weights = _fit([rows[place] for place in range(len(rows)) if fold_P[place] != fold], len(words))
        if held:
            margin_P[held] = _margins([rows[place] for place in held], weights).double()
    weights = _fit(rows, len(words))
    order = weights.argsort().tolist()
    good = [words[place] for place in order[::-1][:TOP_WORDS] if weights[place] > 0]
    bad = [words[place] for place in order[:TOP_WORDS] if weights[place] < 0]
    return BagOfWords(accuracy(margin_P.tolist(), [pair.prompt for pair in pairs]), good, bad)


def words_learned(train: Sequence[Pair], held_out: Sequence[Pair]) -> Accuracy | None:
    """What the same model, fitted on some pairs, makes of others; None below MIN_PROMPTS prompts to learn from."""
    if len({pair.prompt for pair in train}) < MIN_PROMPTS:
        return None
    rows, words = _rows(train)
    held = [_difference(_features(pair.better), _features(pair.worse), words) for pair in held_out]
    return accuracy(_margins(held, _fit(rows, len(words))).tolist(), [pair.prompt for pair in held_out])


def _rows(pairs: Sequence[Pair]) -> tuple[list[tuple[list[int], list[float]]], dict[str, int]]:
    """The differences of pairs, and the place of each word that enough of their answers have."""
    features = [(_features(pair.better), _features(pair.worse)) for pair in pairs]
    counts = Counter(word for sides in features for side in sides for word in side)
    words = sorted((word for word, n in counts.items() if n >= MIN_TEXTS), key=lambda word: (-counts[word], word))[:MAX_WORDS]
    places = {word: place for place, word in enumerate(words)}
    return [_difference(better, worse, places) for better, worse in features], places


def _features(text: str) -> set[str]:
    found = words_and_marks(text)
    return {*found, f"ends with {found[-1] if not found[-1].isalnum() else 'a word'}"} if found else set()


def _difference(better: set[str], worse: set[str], places: dict[str, int]) -> tuple[list[int], list[float]]:
    """Places of the words that one answer alone has, and +1 (the better one) or -1 for each."""
    only_better = sorted(places[word] for word in better - worse if word in places)
    only_worse = sorted(places[word] for word in worse - better if word in places)
    return only_better + only_worse, [1.0] * len(only_better) + [-1.0] * len(only_worse)


def _batch(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = torch.tensor([len(places) for places, _ in rows])
    places = torch.tensor([place for row, _ in rows for place in row], dtype=torch.long)
    return places, torch.tensor([sign for _, signs in rows for sign in signs]), sizes.cumsum(0) - sizes


def _margins(rows, weights: torch.Tensor) -> torch.Tensor:
    places, signs, starts = _batch(rows)
    return functional.embedding_bag(places, weights[:, None], starts, mode="sum", per_sample_weights=signs)[:, 0]


def _fit(rows, n_words: int) -> torch.Tensor:
    """Weights that maximise the likelihood of the verdicts times a normal prior on each weight."""
    weights = torch.zeros(n_words, requires_grad=True)
    if not rows or n_words == 0:
        return weights.detach()
    places, signs, starts = _batch(rows)
    optimizer = torch.optim.LBFGS([weights], max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margin_P = functional.embedding_bag(places, weights[:, None], starts, mode="sum", per_sample_weights=signs)[:, 0]
        total = (functional.softplus(-margin_P).sum() + weights.square().sum() / (2 * WORD_SCALE**2)) / len(rows)
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()
