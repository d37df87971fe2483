"""Is one policy better than another? Win rates with intervals, length control, KL of best-of-n, and a verdict that can say no.

Pure statistics (numpy, no models): `stages.compare` brings the answers and their scores, `rlhf.report` shows what is found here.
CANON E1-E5 say what is reported; DESIGN, "The run folder", gives the keys of ``summary.json``.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution

# What the verdict warns of: the marks of a policy that pleases its reward in the wrong way (issue 2, "no cheating").
MAX_LENGTH_RATIO, MIN_LENGTH_RATIO = 1.3, 0.6
MIN_EOS_RATE = 0.98
MIN_OVERLAP = 0.05  # of the prompts with the shorter answer on either side, to speak of equal length
MIN_DISTINCT_RATIO = 0.8
MAX_KL_NATS = 25.0

# (a, b): each is reported when both policies answered. The last three are sanity rows (CANON E5).
PAIRS = (
    ("ppo", "sft"),
    ("ppo_last", "sft"),
    ("ppo", "ppo_last"),
    ("sft", "pretrained"),
    ("sft", "untrained"),
    ("sft_again", "sft"),
    ("sft", "sft"),
)
BEST_OF = re.compile(r"best_of_([1-9]\d*)")
COOLED = re.compile(r"sft_at_(\d+(?:\.\d+)?)")  # SFT sampled at that temperature: what PPO has to beat where it only made the policy surer
ROUND = re.compile(r"round_(\d+)/ppo")  # PPO of an earlier round of rankings
SANITY = ("sft_again", "untrained")  # policies that answer for those rows alone
LABELS = {"ppo": "PPO", "sft": "SFT", "ppo_last": "PPO, last weights", "sft_again": "SFT, drawn again"}
MIN_AGAINST_UNTRAINED = 0.9  # win rate; about 1 is due

PairJudge = Callable[[object, str, str], float]

# One token is a run without spaces; Chinese and Japanese are written without any, so there each character is one.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")


@dataclass(frozen=True)
class Wins:
    """How often a was better than b on the same prompts; a tie counts one half."""

    win_rate: float
    ci95: tuple[float, float]
    wins: int
    ties: int
    losses: int
    decided_win_rate: float | None  # wins / (wins + losses); None when every prompt is a tie


@dataclass(frozen=True)
class Verdicts:
    """A pairwise judge's outcomes for a (1 win, 1/2 tie, 0 loss), and how many verdicts changed with the order shown."""

    outcomes: np.ndarray
    order_flips: int


def label(policy: str) -> str:
    """The policy's name as a reader meets it: ``ppo`` is PPO, ``best_of_4`` is Best of 4."""
    if policy in LABELS:
        return LABELS[policy]
    if cooled := COOLED.fullmatch(policy):
        return f"SFT at temperature {cooled[1]}"
    if earlier := ROUND.fullmatch(policy):
        return f"PPO, round {earlier[1]}"
    words = policy.replace("_", " ")
    return words[:1].upper() + words[1:]


def is_sanity(a: str, b: str) -> bool:
    """True for a comparison whose result is known beforehand: one half of a policy with itself, about one against an untrained model."""
    return a in (b, *SANITY) or b in SANITY


def kl_best_of_n(n: int) -> float:
    """KL in nats per completion from best-of-n to the policy it draws from: log n - (n-1)/n.

    Exact when no two scores are equal, an upper bound otherwise. Source: Gao et al. 2022 (2210.10760), section 2.
    """
    if n < 1:
        raise ValueError(f"best of n needs n >= 1, not {n}")
    return math.log(n) - (n - 1) / n


def distinct_n(texts: list[str], n: int = 2) -> float:
    """Different n-grams over all n-grams of all texts, in [0, 1]; 0 where no text has n tokens. Low: the policy repeats itself.

    Tokens are split at white space, and each Chinese or Japanese character is one. Longer texts score lower, so compare policies on
    the same prompts and read it beside the lengths. Source: Li et al. 2016 (1510.03055), section 5.
    """
    tokens = [_TOKEN.findall(text) for text in texts]
    grams = [tuple(row[i : i + n]) for row in tokens for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


# --- who won, and how sure that is --------------------------------------------------------------------------------------------


def score_outcomes(scores_a: Sequence[float], scores_b: Sequence[float], tie_margin: float = 0.0) -> np.ndarray:
    """Per prompt 1 where a's score is higher, 0 where b's is, 1/2 where they differ by at most ``tie_margin`` (in score units)."""
    a, b = np.asarray(scores_a, dtype=float), np.asarray(scores_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"both policies need one score for each prompt: {a.shape} against {b.shape}")
    bad = np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))
    if bad.size:
        raise ValueError(f"the scores of prompt {bad[0]} are not finite: {a[bad[0]]} against {b[bad[0]]}")
    return np.where(np.abs(a - b) <= tie_margin, 0.5, (a > b).astype(float))


def count_wins(outcomes: Sequence[float]) -> Wins:
    """Win rate and its interval from per-prompt outcomes in {0, 1/2, 1}; ValueError when there are none."""
    values = np.asarray(outcomes, dtype=float)
    if not values.size:
        raise ValueError("nothing to compare: there are no outcomes")
    wins, losses = int((values == 1).sum()), int((values == 0).sum())
    ties = len(values) - wins - losses
    decided = wins / (wins + losses) if wins + losses else None
    return Wins(float(values.mean()), _interval95(wins, ties, losses), wins, ties, losses, decided)


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], tie_margin: float = 0.0) -> Wins:
    """How often a's score beats b's on the same prompts, with a 95 % interval over prompts (see `score_outcomes`, `count_wins`)."""
    return count_wins(score_outcomes(scores_a, scores_b, tie_margin))


def _interval95(wins: int, ties: int, losses: int) -> tuple[float, float]:
    """Wilson's score interval for the mean p of outcomes in {0, 1/2, 1}: all p with (rate - p)^2 <= z^2/n (p(1-p) - t/4).

    p(1-p) - t/4 is the variance of such an outcome with tie share t, so paired answers that often tie get the narrower interval they
    deserve, and without ties this is Wilson's (1927). t is shrunk by z^2 imagined decided prompts: a handful of ties, and nothing
    else, must not look like certainty. Like Wilson's it stays inside [0, 1] and has a width at rates 0 and 1.
    """
    n = wins + ties + losses
    return wilson_interval((wins + ties / 2) / n, n, ties / (n + Z95**2))


def wilson_interval(rate: float, n: float, tie_share: float = 0.0) -> tuple[float, float]:
    """95 % interval of a rate in [0, 1] over n draws, as many as they are worth; `tie_share` of them count one half (see `_interval95`)."""
    slack = Z95**2 / n
    centre = (rate + slack / 2) / (1 + slack)
    half = math.sqrt(max(centre**2 - (rate**2 + slack * tie_share / 4) / (1 + slack), 0.0))
    return min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate)  # at rates 0 and 1 the end is the rate, to the last bit


def verdicts(judge: PairJudge, prompts: Sequence, a: Sequence[str], b: Sequence[str]) -> Verdicts:
    """Ask a pairwise judge in both orders: a wins or loses only where both orders say so, everything else is a tie (CANON E3).

    ``judge(prompt, first, second)`` is above 0 when the first answer is better, below 0 when the second is, 0 for a tie.
    """
    if not len(prompts) == len(a) == len(b):
        raise ValueError(f"{len(prompts)} prompts, {len(a)} answers of a and {len(b)} of b: the three must match")
    outcomes, flips = [], 0
    for prompt, answer_a, answer_b in zip(prompts, a, b, strict=True):
        shown_first, shown_second = np.sign(judge(prompt, answer_a, answer_b)), -np.sign(judge(prompt, answer_b, answer_a))
        flips += bool(shown_first != shown_second)
        outcomes.append(0.5 + shown_first / 2 if shown_first == shown_second else 0.5)
    return Verdicts(np.asarray(outcomes), flips)


# --- at equal length ----------------------------------------------------------------------------------------------------------


def length_controlled_win_rate(
    outcomes: Sequence[float], lengths_a: Sequence[float], lengths_b: Sequence[float]
) -> tuple[float, tuple[float, float]] | None:
    """(win rate a would have if its answers were as long as b's, its 95 % interval); None where one side is nearly always the longer.

    A logistic regression of the outcome on tanh of the length difference over its standard deviation, and an intercept; reported is its
    prediction at difference 0. A small ridge keeps it finite when every prompt is won. Source: Dubois et al. 2024 (2404.04475),
    equation 1, without the terms for the prompt. The interval is Wilson's for as many prompts as would tell this rate as precisely
    as the regression does; it takes a tie for a decided prompt, and so is rather too wide.
    With fewer than MIN_OVERLAP of the differences on either side of 0 the line would be read where nothing was seen.
    """
    target = np.asarray(outcomes, dtype=float)
    difference = np.asarray(lengths_a, dtype=float) - np.asarray(lengths_b, dtype=float)
    if target.shape != difference.shape or not target.size:
        raise ValueError(f"one length of each answer for each outcome: {target.shape} against {difference.shape}")
    if min(np.mean(difference <= 0), np.mean(difference >= 0)) < MIN_OVERLAP:
        return None
    feature = np.tanh(difference / (difference.std() or 1.0))
    weights, covariance = _logistic_fit(np.stack([np.ones_like(feature), feature], axis=1), target)
    rate = float(_sigmoid(weights[0]))
    return rate, wilson_interval(rate, float(1 / (rate * (1 - rate) * covariance[0, 0])))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))  # no overflow at either end


def _logistic_fit(features: np.ndarray, target: np.ndarray, ridge: float = 0.1, steps: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """(weights, their covariance) of a logistic regression with soft targets, by Newton's method; ``ridge``/2 of their square joins the loss."""

    def loss(weights):
        logits = features @ weights
        return np.sum(np.logaddexp(0, logits) - target * logits) + ridge / 2 * weights @ weights

    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        probability = _sigmoid(features @ weights)
        gradient = features.T @ (probability - target) + ridge * weights
        curvature = (features.T * (probability * (1 - probability))) @ features + ridge * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-12:
            step /= 2  # Newton overshoots where the classes are nearly separable
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return weights, np.linalg.inv(curvature)


# --- the summary --------------------------------------------------------------------------------------------------------------


def summarise(
    samples: list[dict],
    judge: str,
    policies: Sequence[str],
    *,
    proxy_is_judge: bool = False,
    tie_margin: float = 0.0,
    pair_judge: PairJudge | None = None,
) -> dict:
    """Everything that ``summary.json`` holds, from the lines of ``samples.jsonl``.

    samples: ``{"prompt": messages, "family", "id", "answers": {policy: {"text", "gold", "proxy", "judge", "kl", "length", "ended"}}}``.
    judge: the name shown; its scores, ``answer["judge"]``, decide the wins, and being given to one answer at a time they know no order.
    pair_judge: a judge of two answers decides instead, asked in both orders (`verdicts`). proxy_is_judge: PPO was trained on it (E2).
    Raises ValueError for no samples, a policy without an answer, or a score that is not finite.
    """
    _check(samples, policies)
    columns = {policy: [row["answers"][policy] for row in samples] for policy in policies}
    pairs = _pairs(policies)
    compared = [_compare(samples, a, b, judge, tie_margin, pair_judge) for a, b in pairs]
    return {
        "judge": judge,
        "proxy_is_judge": proxy_is_judge,
        "n_prompts": len(samples),
        "tie_margin": tie_margin,
        "order_flips": sum(row["order_flips"] for row in compared),
        "policies": {policy: _describe(policy, answers) for policy, answers in columns.items()},
        "comparisons": compared,
        "by_family": _by_family(samples, policies),
        "sanity": {f"{a}_vs_{b}": row["win_rate"] for (a, b), row in zip(pairs, compared, strict=True) if is_sanity(a, b)},
    }


def _pairs(policies: Sequence[str]) -> list[tuple[str, str]]:
    """PAIRS among the policies, and PPO against each best of N, SFT at a temperature and earlier PPO, and these against SFT; sanity rows last."""
    def between(*kinds: re.Pattern) -> list[tuple[str, str]]:
        named = [name for name in policies if any(kind.fullmatch(name) for kind in kinds)]
        return [pair for name in named for pair in (("ppo", name), (name, "sft"))]

    pairs = [pair for pair in (*PAIRS[:1], *between(BEST_OF), *PAIRS[1:], *between(COOLED, ROUND)) if set(pair) <= set(policies)]
    return sorted(pairs, key=lambda pair: is_sanity(*pair))


def _check(samples: list[dict], policies: Sequence[str]) -> None:
    if not samples:
        raise ValueError("nothing to summarise: there are no samples")
    for row in samples:
        for policy in policies:
            answer = row["answers"].get(policy)
            if answer is None:
                raise ValueError(f"prompt {row.get('id')} has no answer of policy {policy}")
            for key in ("gold", "proxy", "judge", "kl", "length"):
                if answer[key] is not None and not math.isfinite(answer[key]):
                    raise ValueError(f"prompt {row.get('id')}: {key} of policy {policy} is {answer[key]}, not a finite number")


def _describe(policy: str, answers: list[dict]) -> dict:
    best_of = BEST_OF.fullmatch(policy)
    kl_by_definition = kl_best_of_n(int(best_of[1])) if best_of else 0.0 if policy == "sft" else None
    kl_mean = _mean(answers, "kl")
    return {
        "gold_mean": _mean(answers, "gold"),
        "proxy_mean": _mean(answers, "proxy"),
        "judge_mean": _mean(answers, "judge"),
        "kl_mean": kl_by_definition if kl_mean is None else kl_mean,
        "length_mean": _mean(answers, "length"),
        "eos_rate": sum(bool(answer["ended"]) for answer in answers) / len(answers),
        "distinct_2": distinct_n([answer["text"] for answer in answers], 2),
    }


def _mean(answers: list[dict], key: str) -> float | None:
    """Mean over the prompts, or None where any is missing: a mean over other prompts could not be compared."""
    values = [answer[key] for answer in answers]
    return None if any(value is None for value in values) else sum(values) / len(values)


def _compare(samples: list[dict], a: str, b: str, judge: str, tie_margin: float, pair_judge: PairJudge | None) -> dict:
    answers_a, answers_b = ([row["answers"][policy] for row in samples] for policy in (a, b))

    def column(key):
        return [x[key] for x in answers_a], [x[key] for x in answers_b]

    if pair_judge:
        judged = verdicts(pair_judge, [row["prompt"] for row in samples], *column("text"))
    else:
        judged = Verdicts(score_outcomes(*column("judge"), tie_margin), 0)
    wins, controlled = count_wins(judged.outcomes), length_controlled_win_rate(judged.outcomes, *column("length"))
    return {
        "a": a,
        "b": b,
        "judge": judge,
        "win_rate": wins.win_rate,
        "ci95": list(wins.ci95),
        "wins": wins.wins,
        "ties": wins.ties,
        "losses": wins.losses,
        "decided_win_rate": wins.decided_win_rate,
        "length_controlled_win_rate": controlled and controlled[0],
        "length_controlled_ci95": controlled and list(controlled[1]),
        "order_flips": judged.order_flips,
    }


def _by_family(samples: list[dict], policies: Sequence[str]) -> dict:
    families = sorted({row["family"] for row in samples if row.get("family")})
    table = {}
    for family in families:
        rows = [row for row in samples if row.get("family") == family]
        columns = {policy: [row["answers"][policy] for row in rows] for policy in policies}
        means = {policy: {"gold_mean": _mean(x, "gold"), "judge_mean": _mean(x, "judge")} for policy, x in columns.items()}
        table[family] = {"n": len(rows), "policies": means}
    return table


# --- the verdict --------------------------------------------------------------------------------------------------------------


def main_comparison(summary: dict) -> dict | None:
    """The comparison that the verdict is about: ppo against sft, or else the first of two different policies; None without one."""
    real = [row for row in summary["comparisons"] if not is_sanity(row["a"], row["b"])]
    return next((row for row in real if (row["a"], row["b"]) == ("ppo", "sft")), real[0] if real else None)


def headline(summary: dict) -> str:
    """One plain sentence: better, worse, or no difference shown; it opens with a warning when the judge is the training reward (E2)."""
    row = main_comparison(summary)
    if row is None:
        return "Nothing was compared: " + ("only one policy answered." if len(summary["policies"]) == 1 else "no pair is made of these policies.")
    a, b = label(row["a"]), label(row["b"])
    where, result = f"on {summary['n_prompts']} held-out prompts", _result(summary, row)
    if row["ci95"][0] > 0.5:
        sentence = f"{a} beat {b} {where}: {result}{_cooled_gains(summary)}."
    elif row["ci95"][1] < 0.5:
        sentence = f"{a} is worse than {b} {where}: {result}."
    else:
        sentence = f"No difference was shown between {a} and {b} {where}: {result}."
    if summary.get("proxy_is_judge"):
        return f"Judged by the very reward that PPO was trained on, so not independent evidence: {sentence}"
    return sentence


def _result(summary: dict, row: dict) -> str:
    judges = {"gold": "the gold score", "judge": "the independent judge", "proxy": "the run's reward model"}
    judge = judges.get(summary["judge"], f"the judge {summary['judge']}")
    judge = "that reward" if summary.get("proxy_is_judge") else judge
    text = f"win rate {_rate(row, '95 % interval ')} by {judge}"
    a, ratio = summary["policies"][row["a"]], length_ratio(summary, row)
    costs = [f"KL {round(a['kl_mean'], 1) + 0.0:.1f} nats"] if a["kl_mean"] is not None else []
    costs += [f"{ratio:.2f} times the length"] if ratio is not None else []
    return f"{text}, at {' and '.join(costs)}" if costs else text


def _rate(row: dict, of: str = "") -> str:
    """A win rate with its interval; an end at 0.503 must not be printed as 0.50, nor one at 0.5004 as 0.500."""
    (low, high), digits = row["ci95"], 2 + sum(any(round(end, places) == 0.5 for end in row["ci95"]) for places in (2, 3))
    return f"{row['win_rate']:.{digits}f} ({of}{low:.{digits}f}-{high:.{digits}f})"


def length_ratio(summary: dict, row: dict) -> float | None:
    """Mean length of a's answers over b's; None where b's are empty."""
    a, b = (summary["policies"][row[side]]["length_mean"] for side in "ab")
    return a / b if b else None


def caveats(summary: dict) -> list[str]:
    """What a reader must know before believing the headline; an empty list when nothing looks wrong."""
    row = main_comparison(summary)
    if row is None:
        return []
    a, b = summary["policies"][row["a"]], summary["policies"][row["b"]]
    name, other = label(row["a"]), label(row["b"])
    found = _length_caveats(length_ratio(summary, row), row, name, other)
    if a["eos_rate"] < MIN_EOS_RATE:
        found.append(f"{name} ends only {100 * a['eos_rate']:.1f} % of its answers by itself ({other} {100 * b['eos_rate']:.1f} %); "
                     "the rest were cut off.")
    if a["distinct_2"] < MIN_DISTINCT_RATIO * b["distinct_2"]:
        found.append(f"{name} repeats itself: distinct-2 is {a['distinct_2']:.2f}, {other}'s is {b['distinct_2']:.2f}.")
    if a["kl_mean"] is not None and a["kl_mean"] > MAX_KL_NATS:
        found.append(f"{name} has moved far from SFT: KL {a['kl_mean']:.1f} nats is above {MAX_KL_NATS:.0f}.")
    lost = summary["judge"] == "gold" and row["ci95"][1] < 0.5  # shown, not a fall of the mean alone
    if lost and a["proxy_mean"] > b["proxy_mean"] and a["gold_mean"] < b["gold_mean"]:
        found.append(f"The reward rose while the gold score fell ({b['gold_mean']:.3f} to {a['gold_mean']:.3f}): reward over-optimisation.")
    return _judge_caveats(summary, row) + found + _cooled_caveats(summary) + _sanity_caveats(summary)


def judge_on_pairs(held_out: dict) -> str:
    """How well a reward model orders pairs that people ordered: of ``eval`` in a reward model's ``metrics.json``."""
    low, high = held_out["ci95"]
    return (f"orders {held_out['accuracy']:.2f} of {held_out['pairs']} held-out pairs right (95 % interval {low:.2f}-{high:.2f}; "
            f"the longer answer wins: {held_out['longer_wins_accuracy']:.2f})")


def _judge_caveats(summary: dict, row: dict) -> list[str]:
    """A judge that is a reward model is worth what it knows; one that says the same of all prompts knows nothing of them."""
    found, held_out, n = [], summary.get("judge_held_out"), summary["n_prompts"]
    if held_out is not None and held_out["ci95"][0] <= 0.5:
        found.append(f"The judge {judge_on_pairs(held_out)}: not shown to be better than chance, so neither is this result. "
                     "More preferences would help.")
    if row["order_flips"] > n / 2:
        found.append(f"The judge changed its verdict with the order of the answers on {row['order_flips']} of {n} prompts, which count as ties: it "
                     "cannot tell them apart. Of a function above 0 is wanted where the first is better, and below 0 where the second is.")
    elif row["ties"] == n:
        found.append(f"The judge called all {n} prompts ties: it may not tell these answers apart.")
    if summary["judge"] == "proxy" and not summary["proxy_is_judge"] and any(BEST_OF.fullmatch(name) for name in summary["policies"]):
        found.append("Best of N was chosen by this judge: its rows are no evidence.")
    return found


def _length_caveats(ratio: float | None, row: dict, name: str, other: str) -> list[str]:
    found = []
    if ratio is not None and not MIN_LENGTH_RATIO <= ratio <= MAX_LENGTH_RATIO:
        found.append(f"{name}'s answers are {ratio:.2f} times as long as {other}'s: part of the result may be length.")
    controlled, shown = row["length_controlled_win_rate"], row["ci95"][0] > 0.5
    if shown and controlled is None:
        found.append(f"One of {name} and {other} is nearly always the longer: what would be at equal length cannot be told.")
    elif shown and controlled <= 0.5:
        found.append(f"At equal length the win rate is {controlled:.2f}: the difference is one of length.")
    elif shown and row["length_controlled_ci95"][0] <= 0.5:
        low, high = row["length_controlled_ci95"]
        found.append(f"At equal length no difference is shown: {controlled:.2f} ({low:.2f}-{high:.2f}).")
    return found


def _cooled_caveats(summary: dict) -> list[str]:
    """Where a lower temperature may be all that PPO found."""
    return [f"Against {label(row['b'])} no gain is shown: PPO's win rate is {_rate(row)}."
            for row in _against_cooled(summary) if row["ci95"][0] <= 0.5]


def _cooled_gains(summary: dict) -> str:
    """The end of a sentence about PPO: the lower temperatures of SFT that it beat too."""
    return "".join(f"; it also beat {label(row['b'])}: {_rate(row)}" for row in _against_cooled(summary) if row["ci95"][0] > 0.5)


def _against_cooled(summary: dict) -> list[dict]:
    return [row for row in summary["comparisons"] if row["a"] == "ppo" and COOLED.fullmatch(row["b"])]


def _sanity_caveats(summary: dict) -> list[str]:
    found = []
    for row in summary["comparisons"]:
        if row["b"] == "untrained":
            wrong, due = row["win_rate"] < MIN_AGAINST_UNTRAINED, "about 1"
        else:
            wrong, due = is_sanity(row["a"], row["b"]) and not row["ci95"][0] <= 0.5 <= row["ci95"][1], "0.50"
        found += [f"Sanity: {label(row['a'])} against {label(row['b'])} gives {row['win_rate']:.2f} where {due} is due."] if wrong else []
    return found


def verdict(summary: dict) -> str:
    """The headline and its caveats as one line of text, for the terminal and the end of a pipeline run."""
    return " ".join([headline(summary), *caveats(summary)])
