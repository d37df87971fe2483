"""The comparison's statistics: a hand-made table for each, and one property that its definition demands."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.comparison import (
    caveats,
    count_wins,
    distinct_n,
    headline,
    kl_best_of_n,
    label,
    length_controlled_win_rate,
    score_outcomes,
    summarise,
    verdict,
    verdicts,
    win_rate,
)

Z2 = 1.959963984540054**2
COUNTS = st.tuples(*[st.integers(0, 60)] * 3).filter(any)


def outcomes_of(wins, ties, losses):
    return [1.0] * wins + [0.5] * ties + [0.0] * losses


# --- distinct-n, KL of best-of-n --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b", "a b c"], 2, 3 / 5),  # ab ba ab | ab bc: three different of five
        (["a b a b", "a b c"], 1, 3 / 7),
        (["a b a b", "a b c"], 3, 3 / 3),  # aba bab | abc
        (["one"], 2, 0.0),
        ([], 2, 0.0),
        (["你好你好"], 2, 2 / 3),  # 你好 好你 你好: no spaces, so each character is a token
        (["GPT 很好"], 2, 2 / 2),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_distinct_n_falls_when_the_same_texts_come_twice():
    texts = ["the red pear", "a green apple here"]
    assert distinct_n(texts) == 1.0
    assert distinct_n(texts * 2) == 0.5


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089)])
def test_E4_kl_of_best_of_n_by_hand(n, expected):
    assert kl_best_of_n(n) == pytest.approx(expected, abs=1e-6)


def test_E4_kl_of_best_of_n_is_that_of_the_best_of_n_ranks():
    ranks, n = np.arange(1, 100_001), 4  # the best of n draws has rank k with probability (k^n - (k-1)^n) / N^n
    chances = np.diff(np.concatenate([[0], (ranks / len(ranks)) ** n]))
    assert kl_best_of_n(n) == pytest.approx(np.sum(chances * np.log(chances * len(ranks))), abs=1e-4)


def test_best_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        kl_best_of_n(0)


# --- win rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "rate", "low", "high", "decided"),
    [
        ((8, 0, 2), 0.8, 0.4902, 0.9433, 0.8),  # Wilson's interval for 8 of 10
        ((10, 0, 0), 1.0, 0.7225, 1.0, 1.0),
        ((0, 0, 10), 0.0, 0.0, 0.2775, 0.0),
        ((6, 2, 2), 0.7, 0.4179, 0.8711, 0.75),  # with z^2 = 3.8415: centre 0.64449, half width 0.22658
        ((0, 4, 0), 0.5, 0.2551, 0.7449, None),  # tie share 4 / 7.8415: d^2 = 0.9604 (0.25)(0.4899) / 1.9604, d = 0.24494
        ((1, 0, 0), 1.0, 0.2065, 1.0, 1.0),
    ],
)
def test_E3_win_rate_and_interval_by_hand(counts, rate, low, high, decided):
    wins = count_wins(outcomes_of(*counts))
    assert (wins.wins, wins.ties, wins.losses) == counts
    assert (wins.win_rate, *wins.ci95) == pytest.approx((rate, low, high), abs=6e-5)
    assert wins.decided_win_rate == decided


@given(COUNTS)
def test_E3_interval_ends_lie_one_point_96_errors_away(counts):
    wins, n = count_wins(outcomes_of(*counts)), sum(counts)
    for end in wins.ci95:
        variance = end * (1 - end) - counts[1] / (n + Z2) / 4
        assert (end - wins.win_rate) ** 2 == pytest.approx(Z2 * variance / n, abs=1e-9)
    assert 0 <= wins.ci95[0] <= wins.win_rate <= wins.ci95[1] <= 1
    assert wins.ci95[0] < wins.ci95[1]


@given(COUNTS)
def test_E3_swapping_the_sides_mirrors_everything(counts):
    there, back = count_wins(outcomes_of(*counts)), count_wins(outcomes_of(*counts[::-1]))
    assert (back.win_rate, *back.ci95) == pytest.approx((1 - there.win_rate, 1 - there.ci95[1], 1 - there.ci95[0]))


@pytest.mark.parametrize("n", [10, 50, 500])
@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.3, 0.4), (0.74, 0.16), (0.05, 0.9), (0.95, 0.0)])
def test_E3_interval_covers_the_truth_95_times_in_100(n, win, tie):
    draws = np.random.default_rng(0).multinomial(n, [win, tie, 1 - win - tie], size=1500)
    covered = [low <= win + tie / 2 <= high for low, high in (count_wins(outcomes_of(*row)).ci95 for row in draws)]
    assert np.mean(covered) > {10: 0.9, 50: 0.92, 500: 0.93}[n]  # counts come in steps: Wilson's own coverage of 0.5 at n = 50 is 0.935
    if n == 500:
        assert np.mean(covered) < 0.98  # and it is no wider than it must be


def test_scores_within_the_margin_are_ties():
    assert score_outcomes([1.0, 0.5, 0.2, 0.9], [0.0, 0.5, 0.3, 1.5], tie_margin=0.15).tolist() == [1.0, 0.5, 0.5, 0.0]
    assert win_rate([1.0, 0.5, 0.2], [0.0, 0.5, 0.3]).win_rate == 0.5
    assert win_rate([1.0, 0.5, 0.2], [0.0, 0.5, 0.3], tie_margin=0.15).win_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1.0, math.nan], [0.0, 0.0], "prompt 1 .* not finite"), ([1.0], [1.0, 2.0], "one score for each prompt"), ([], [], "nothing")],
)
def test_scores_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        win_rate(a, b)


def test_E3_a_judge_that_likes_the_first_place_decides_nothing():
    result = verdicts(lambda prompt, first, second: 1, ["p"] * 3, ["x"] * 3, ["y"] * 3)
    assert result.outcomes.tolist() == [0.5] * 3
    assert result.order_flips == 3


def test_E3_a_judge_that_knows_no_order_is_believed():
    result = verdicts(lambda prompt, first, second: len(first) - len(second), ["p"] * 3, ["long", "x", "as"], ["s", "longer", "is"])
    assert result.outcomes.tolist() == [1.0, 0.0, 0.5]
    assert result.order_flips == 0


def test_E3_a_verdict_in_one_order_only_is_a_tie():
    def first_place_breaks_ties(prompt, first, second):
        return len(first) - len(second) or 1

    result = verdicts(first_place_breaks_ties, ["p", "p"], ["long", "as"], ["s", "is"])
    assert (result.outcomes.tolist(), result.order_flips) == ([1.0, 0.5], 1)


# --- at equal length ----------------------------------------------------------------------------------------------------------


def test_E3_length_control_by_hand():
    # At +10 and -10 tokens, half of the prompts each, 80 % and 60 % are won. The spread is 10, so the feature is +-tanh 1 and the
    # intercept is the mean of the two log odds: (1.38629 + 0.40547) / 2 = 0.89588, whose sigmoid is 0.7101. Its variance is
    # (1 / (2000 * 0.8 * 0.2) + 1 / (2000 * 0.6 * 0.4)) / 4 = 0.0013021, as of 1 / (0.7101 * 0.2899 * 0.0013021) = 3731 prompts,
    # whose Wilson interval is 0.7101 -+ 1.96 * sqrt(0.7101 * 0.2899 / 3731), a little nearer to one half.
    outcomes = outcomes_of(1600, 0, 400) + outcomes_of(1200, 0, 800)
    lengths = [30] * 2000 + [10] * 2000
    rate, interval = length_controlled_win_rate(outcomes, lengths, [20] * 4000)
    assert rate == pytest.approx(0.7101, abs=1e-3)
    assert interval == pytest.approx((0.6954, 0.7245), abs=1e-3)


def test_E3_length_control_changes_nothing_where_length_decides_nothing():
    rng = np.random.default_rng(3)
    outcomes = rng.choice([1.0, 0.5, 0.0], 2000, p=[0.6, 0.2, 0.2])
    rate, _ = length_controlled_win_rate(outcomes, rng.normal(30, 8, 2000), rng.normal(25, 8, 2000))
    assert rate == pytest.approx(outcomes.mean(), abs=0.03)


def test_E3_length_control_takes_away_what_length_alone_has_won():
    difference = np.random.default_rng(4).normal(5, 10, 2000)
    outcomes = (difference > 0).astype(float)
    assert outcomes.mean() > 0.65
    rate, (low, high) = length_controlled_win_rate(outcomes, 100 + difference, np.full(2000, 100))
    assert rate == pytest.approx(0.5, abs=0.05) and low < 0.5 < high


@pytest.mark.parametrize(("differences", "told"), [
    ([5] * 100, False), ([3, 4, 5, 6, 7] * 20, False), ([5] * 96 + [-5] * 4, False), ([5] * 95 + [-5] * 5, True), ([5] * 95 + [0] * 5, True),
    ([0] * 100, True), ([0], True), ([1], False), ([-5] * 96 + [5] * 4, False)])
def test_E3_where_one_side_is_always_longer_equal_length_cannot_be_told(differences, told):
    outcomes = [float(d > 0) if d else 0.5 for d in differences]  # won by length alone
    found = length_controlled_win_rate(outcomes, [20 + d for d in differences], [20] * len(differences))
    assert (found is not None) == told


def test_E3_the_interval_at_equal_length_holds_the_truth():
    """In 95 of 100 draws of 200 prompts, or a few less or more."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(400):
        difference = rng.normal(3, 10, 200)
        won = rng.random(200) < 1 / (1 + np.exp(-(0.5 + np.tanh(difference / 10))))
        rate, (low, high) = length_controlled_win_rate(won.astype(float), 50 + difference, np.full(200, 50))
        held += low <= 1 / (1 + math.exp(-0.5)) <= high
    assert 0.92 <= held / 400 <= 0.98


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=40))
@settings(deadline=None)
def test_E3_length_control_is_finite_and_mirrors(rows):
    outcomes, a, b = (np.array(column, dtype=float) for column in zip(*rows))
    found, mirrored = length_controlled_win_rate(outcomes, a, b), length_controlled_win_rate(1 - outcomes, b, a)
    assert (found is None) == (mirrored is None)
    if found is not None:
        rate, (low, high) = found
        assert 0 <= low <= rate <= high <= 1 and 0 < rate < 1
        assert mirrored[0] == pytest.approx(1 - rate, abs=1e-6)
        assert mirrored[1] == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_E3_length_control_of_all_wins_is_near_one():
    rng = np.random.default_rng(5)
    rate, (low, _) = length_controlled_win_rate(np.ones(500), rng.normal(30, 5, 500), rng.normal(30, 5, 500))
    assert 0.99 < rate < 1 and low > 0.98


def test_lengths_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="for each outcome"):
        length_controlled_win_rate([1.0, 0.0], [3], [4])


# --- the summary and the verdict ----------------------------------------------------------------------------------------------


def answer(gold, proxy=0.0, text="a b c", kl=None, length=10, ended=True):
    return {
        "text": text,
        "gold": gold,
        "proxy": proxy,
        "judge": proxy if gold is None else gold,
        "kl": kl,
        "length": length,
        "ended": ended,
    }


def four_rows():
    """PPO wins twice, ties once, loses once against SFT."""
    sft, ppo = [0.2, 0.4, 0.6, 1.0], [1.0, 0.8, 0.6, 0.0]
    rows = []
    for i in range(4):
        answers = {
            "sft": answer(sft[i], proxy=i, text="a b a b"),
            "ppo": answer(ppo[i], proxy=i + 1, kl=2.0 * i, length=12, ended=i > 0),
            "best_of_4": answer(0.7),
            "pretrained": answer(0.0, kl=9.0),
        }
        rows.append(
            {"prompt": [{"role": "user", "content": "?"}], "family": "facts" if i < 2 else "notes", "id": str(i), "answers": answers}
        )
    return rows


POLICIES = ["pretrained", "sft", "best_of_4", "ppo"]


def test_E4_summary_by_hand():
    summary = summarise(four_rows(), "gold", POLICIES)
    assert (summary["judge"], summary["proxy_is_judge"], summary["n_prompts"], summary["order_flips"]) == ("gold", False, 4, 0)
    ppo = summary["policies"]["ppo"]
    assert ppo == pytest.approx(
        {"gold_mean": 0.6, "proxy_mean": 2.5, "judge_mean": 0.6, "kl_mean": 3.0, "length_mean": 12.0, "eos_rate": 0.75, "distinct_2": 2 / 8}
    )
    assert summary["policies"]["sft"]["kl_mean"] == 0.0
    assert summary["policies"]["sft"]["distinct_2"] == 2 / 12
    assert summary["policies"]["best_of_4"]["kl_mean"] == pytest.approx(0.636294, abs=1e-6)
    assert summary["by_family"]["facts"]["n"] == 2
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["by_family"]["facts"]["policies"]["ppo"]["gold_mean"] == pytest.approx(0.9)


def test_E1_every_policy_that_answers_beside_ppo_and_sft_is_compared_with_both():
    names = ["sft", "ppo", "best_of_2", "best_of_16", "sft_at_0.5", "round_1/ppo"]
    rows = [{**row, "answers": {name: row["answers"].get(name, row["answers"]["best_of_4"]) for name in names}} for row in four_rows()]
    compared = [(row["a"], row["b"]) for row in summarise(rows, "gold", names)["comparisons"]]
    assert compared == [("ppo", "sft"), ("ppo", "best_of_2"), ("best_of_2", "sft"), ("ppo", "best_of_16"), ("best_of_16", "sft"),
                        ("ppo", "sft_at_0.5"), ("sft_at_0.5", "sft"), ("ppo", "round_1/ppo"), ("round_1/ppo", "sft"), ("sft", "sft")]
    assert label("round_1/ppo") == "PPO, round 1"
    alone = summarise(rows, "gold", ["sft", "best_of_2"])["comparisons"]
    assert [(row["a"], row["b"]) for row in alone] == [("best_of_2", "sft"), ("sft", "sft")]


def test_E1_E5_comparisons_that_are_due():
    rows = {(row["a"], row["b"]): row for row in summarise(four_rows(), "gold", POLICIES)["comparisons"]}
    assert list(rows) == [("ppo", "sft"), ("ppo", "best_of_4"), ("best_of_4", "sft"), ("sft", "pretrained"), ("sft", "sft")]
    main = rows["ppo", "sft"]
    assert (main["wins"], main["ties"], main["losses"], main["win_rate"]) == (2, 1, 1, 0.625)
    assert main["decided_win_rate"] == pytest.approx(2 / 3)
    design = {"a", "b", "judge", "win_rate", "ci95", "wins", "ties", "losses", "length_controlled_win_rate"}
    assert all(design <= set(row) for row in rows.values())
    assert rows["sft", "pretrained"]["win_rate"] == 1.0
    assert (rows["sft", "sft"]["win_rate"], rows["sft", "sft"]["ties"]) == (0.5, 4)


def test_without_a_gold_judge_gold_is_null():
    rows = four_rows()
    for row in rows:
        for each in row["answers"].values():
            each |= {"gold": None, "judge": each["proxy"]}
    summary = summarise(rows, "another reward model", ["sft", "ppo"])
    assert summary["policies"]["ppo"]["gold_mean"] is None
    assert summary["comparisons"][0]["win_rate"] == 1.0
    assert "by the judge another reward model" in verdict(summary)
    assert "by the independent judge" in verdict({**summary, "judge": "judge"})


def test_E3_a_pairwise_judge_is_asked_in_both_orders():
    summary = summarise(four_rows(), "likes the first", ["sft", "ppo"], pair_judge=lambda prompt, first, second: 1)
    assert summary["comparisons"][0]["ties"] == 4
    assert summary["comparisons"][0]["order_flips"] == 4
    assert headline(summary).startswith("No difference was shown")


def test_what_cannot_be_summarised_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        summarise([], "gold", POLICIES)
    with pytest.raises(ValueError, match="prompt 0 has no answer of policy ppo_last"):
        summarise(four_rows(), "gold", [*POLICIES, "ppo_last"])
    rows = four_rows()
    rows[2]["answers"]["ppo"]["proxy"] = math.nan
    with pytest.raises(ValueError, match="prompt 2: proxy of policy ppo is nan"):
        summarise(rows, "gold", POLICIES)


def summary_of(rate, low, high, judge="gold", proxy_is_judge=False, controlled=(0.7, 0.6, 0.8), order_flips=0, ties=0,
               best_of_4=False, **ppo):
    sft = {"gold_mean": 0.5, "proxy_mean": 0.0, "kl_mean": 0.0, "length_mean": 20.0, "eos_rate": 1.0, "distinct_2": 0.5}
    better = {"gold_mean": 0.8, "proxy_mean": 1.0, "kl_mean": 3.14, "length_mean": 18.6, "eos_rate": 0.99, "distinct_2": 0.48}
    row = {
        "a": "ppo",
        "b": "sft",
        "win_rate": rate,
        "ci95": [low, high],
        "ties": ties,
        "length_controlled_win_rate": controlled and controlled[0],
        "length_controlled_ci95": controlled and [*controlled[1:]],
        "order_flips": order_flips,
    }
    return {
        "judge": judge,
        "proxy_is_judge": proxy_is_judge,
        "n_prompts": 500,
        "policies": {"sft": sft, "ppo": better | ppo} | ({"best_of_4": better} if best_of_4 else {}),
        "comparisons": [row],
    }


@pytest.mark.parametrize(
    ("figures", "claim", "result"),
    [
        ((0.74, 0.71, 0.77), "PPO beat SFT", "0.74 (95 % interval 0.71-0.77)"),
        ((0.52, 0.48, 0.56), "No difference was shown between PPO and SFT", "0.52 (95 % interval 0.48-0.56)"),
        ((0.48, 0.44, 0.52), "No difference was shown between PPO and SFT", "0.48 (95 % interval 0.44-0.52)"),
        ((0.40, 0.36, 0.44), "PPO is worse than SFT", "0.40 (95 % interval 0.36-0.44)"),
    ],
)
def test_E3_verdict_can_say_yes_no_and_worse(figures, claim, result):
    rest = "by the gold score, at KL 3.1 nats and 0.93 times the length."
    assert verdict(summary_of(*figures)) == f"{claim} on 500 held-out prompts: win rate {result} {rest}"


def test_an_interval_that_just_clears_one_half_is_printed_so():
    assert "0.503-0.567" in headline(summary_of(0.535, 0.503, 0.567))


@pytest.mark.parametrize(("judge", "named"), [("gold", "the gold score"), ("judge", "the independent judge"), ("proxy", "the run's reward model"),
                                              ("my:f", "the judge my:f")])
def test_the_headline_names_the_judge(judge, named):
    assert f"by {named}, at KL" in headline(summary_of(0.74, 0.71, 0.77, judge=judge))


def test_E2_a_judge_that_trained_the_policy_is_said_first():
    text = verdict(summary_of(0.74, 0.71, 0.77, judge="reward model", proxy_is_judge=True))
    assert text.startswith("Judged by the very reward that PPO was trained on")
    assert "PPO beat SFT" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"length_mean": 27.0}, "1.35 times as long"),
        ({"length_mean": 11.0}, "0.55 times as long"),
        ({"eos_rate": 0.95}, "PPO ends only 95.0 % of its answers by itself (SFT 100.0 %)"),
        ({"distinct_2": 0.39}, "repeats itself"),
        ({"kl_mean": 30.0}, "KL 30.0 nats is above 25"),
        ({"controlled": (0.49, 0.4, 0.58)}, "At equal length the win rate is 0.49"),
        ({"controlled": (0.55, 0.47, 0.63)}, "At equal length no difference is shown: 0.55 (0.47-0.63)"),
        ({"controlled": None}, "PPO and SFT is nearly always the longer: what would be at equal length cannot be told"),
        ({"order_flips": 251}, "The judge changed its verdict with the order of the answers on 251 of 500 prompts"),
        ({"ties": 500}, "The judge called all 500 prompts ties"),
        ({"judge": "proxy", "best_of_4": True}, "Best of N was chosen by this judge"),
    ],
)
def test_each_mark_of_cheating_has_its_caveat(changed, words):
    found = caveats(summary_of(0.74, 0.71, 0.77, **changed))
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(("rate", "low", "high", "gold", "said"),
                         [(0.4, 0.36, 0.44, 0.4, True), (0.48, 0.45, 0.51, 0.4, False), (0.4, 0.36, 0.44, 0.6, False)])
def test_over_optimisation_is_said_only_where_the_loss_by_gold_is_shown(rate, low, high, gold, said):
    found = caveats(summary_of(rate, low, high, gold_mean=gold))
    assert any("over-optimisation" in text for text in found) == said


def test_E5_a_sanity_row_that_fails_is_said():
    summary = summary_of(0.74, 0.71, 0.77)
    summary["comparisons"].append({"a": "sft", "b": "sft", "win_rate": 0.7, "ci95": [0.66, 0.74]})
    assert caveats(summary) == ["Sanity: SFT against SFT gives 0.70 where 0.50 is due."]


@pytest.mark.parametrize(("rate", "found"), [(0.97, []), (0.85, ["Sanity: SFT against Untrained gives 0.85 where about 1 is due."])])
def test_E5_an_untrained_model_must_lose(rate, found):
    summary = summary_of(0.74, 0.71, 0.77)
    summary["comparisons"].insert(0, {"a": "sft", "b": "untrained", "win_rate": rate, "ci95": [rate - 0.03, rate + 0.02]})
    assert caveats(summary) == found
    assert headline(summary).startswith("PPO beat SFT"), "the verdict is never about a sanity row"


@pytest.mark.parametrize(("low", "end", "found"), [
    (0.51, "; it also beat SFT at temperature 0.5: 0.53 (0.51-0.56).", []),
    (0.503, "; it also beat SFT at temperature 0.5: 0.530 (0.503-0.560).", []),
    (0.5004, "; it also beat SFT at temperature 0.5: 0.5300 (0.5004-0.5600).", []),
    (0.48, " times the length.", ["Against SFT at temperature 0.5 no gain is shown: PPO's win rate is 0.53 (0.48-0.56)."]),
    (0.5, " times the length.", ["Against SFT at temperature 0.5 no gain is shown: PPO's win rate is 0.5300 (0.5000-0.5600)."])])
def test_whether_a_lower_temperature_gives_the_gain_too_is_said(low, end, found):
    summary = summary_of(0.74, 0.71, 0.77)
    summary["comparisons"] += [{"a": "ppo", "b": "sft_at_0.5", "win_rate": 0.53, "ci95": [low, 0.56]},
                               {"a": "sft_at_0.5", "b": "sft", "win_rate": 0.5, "ci95": [0.47, 0.53]}]
    assert caveats(summary) == found
    assert headline(summary).startswith("PPO beat SFT on") and headline(summary).endswith(end)


@pytest.mark.parametrize(("low", "said"), [(0.51, False), (0.5, True), (0.3, True)])
def test_a_judge_that_may_be_no_better_than_chance_is_said(low, said):
    summary = summary_of(0.74, 0.71, 0.77, judge="judge")
    summary["judge_held_out"] = {"accuracy": 0.55, "ci95": [low, 0.62], "pairs": 90, "longer_wins_accuracy": 0.6}
    found = caveats(summary)
    assert len(found) == said
    if said:
        assert found[0].startswith(f"The judge orders 0.55 of 90 held-out pairs right (95 % interval {low:.2f}-0.62; the longer answer wins: 0.60): "
                                   "not shown to be better than chance")


def test_one_policy_alone_has_no_verdict():
    assert verdict(summarise(four_rows(), "gold", ["sft"])) == "Nothing was compared: only one policy answered."
    summary = summarise(four_rows(), "gold", ["sft", "ppo"])
    assert verdict({**summary, "comparisons": []}) == "Nothing was compared: no pair is made of these policies."


def test_labels():
    assert [label(name) for name in ("ppo", "best_of_4", "pretrained", "ppo_last")] == ["PPO", "Best of 4", "Pretrained", "PPO, last weights"]
