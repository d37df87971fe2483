"""The report: right figures, nothing from outside, nothing run, the same bytes each time, and nothing empty where a stage is missing."""

import base64
import copy
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from rlhf.charts import Series, line_chart, running_mean
from rlhf.comparison import headline, summarise
from rlhf.report import pick_samples, write_report

POLICIES = ["pretrained", "sft", "best_of_4", "ppo"]
FAMILIES = ["arithmetic", "comparing", "facts", "harmful requests", "invented things", "letters", "lists", "next in a sequence", "notes",
            "odd one out", "opposites", "plurals", "sorting", "tone"]  # fmt: skip
SKILL = {"pretrained": 0.25, "sft": 0.55, "best_of_4": 0.75, "ppo": 0.83}
LEVELS = [0.0, 0.25, 0.5, 0.6, 0.8, 1.0]
WORDS = ["apple", "pear", "plum", "seven", "is", "the", "a", "red", "green", "here", "they", "are", "and", "of", "course", "sure"]
ATTACK = "</div></script><script>document.title='run'</script><img src=x onerror=alert(1)>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "input", "br", "img", "link", "hr", "source"}


def make_samples(n=500, families=True, gold=True, seed=1):
    """``n`` rows as in samples.jsonl, with answers that grow better from the pretrained model to PPO."""
    rng = random.Random(seed)
    return [make_row(rng, i, families, gold) for i in range(n)]


def make_row(rng, i, families, gold):
    family = FAMILIES[i % len(FAMILIES)]
    question = f"Please give me a list of {rng.randint(2, 5)} things for my {family} lesson, number {i}."
    answers = {policy: make_answer(rng, policy, gold) for policy in POLICIES}
    return {"prompt": [{"role": "user", "content": question}], "family": family if families else None, "id": f"{i:04d}", "answers": answers}


def make_answer(rng, policy, gold):
    score = LEVELS[min(5, max(0, round(rng.gauss(6 * SKILL[policy] - 0.8, 1.6))))]
    words = [rng.choice(WORDS) for _ in range(rng.randint(4, 18))]
    proxy = 2.2 * (score - 0.55) + rng.gauss(0, 0.5)
    return {
        "text": " ".join(words).capitalize() + ".",
        "gold": score if gold else None,
        "proxy": proxy,
        "judge": score if gold else round(proxy + rng.gauss(0, 0.3), 3),
        "kl": {"sft": 0.0, "ppo": abs(rng.gauss(2.4, 0.8)), "pretrained": abs(rng.gauss(14, 3))}.get(policy),
        "length": int(1.4 * len(words)),
        "ended": rng.random() < 0.995,
    }


def make_curves(seed=1):
    """Metrics of the four stages as their metrics.jsonl would hold them."""
    rng = random.Random(seed)
    pretrain = [{"step": 5 * i, "loss": 1.1 + 6 * math.exp(-i / 20) + rng.gauss(0, 0.05)} for i in range(160)]
    for row in pretrain[20::20]:
        row["eval_loss"] = row["loss"] + 0.05
    sft = [{"step": 2 * i, "loss": 0.9 + 1.5 * math.exp(-i / 12) + rng.gauss(0, 0.03), "learning_rate": 1e-4} for i in range(90)]
    sft[40]["eval_loss"], sft[89]["eval_loss"] = 1.05, 0.98
    accuracy = [0.87 - 0.35 * math.exp(-i / 40) + rng.gauss(0, 0.03) for i in range(200)]
    reward = [{"step": i, "loss": 1.15 - accuracy[i] + rng.gauss(0, 0.03), "accuracy": min(1.0, accuracy[i])} for i in range(200)]
    for row in reward[25::25]:
        row["eval_accuracy"] = row["accuracy"] - 0.02
    return {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": [make_ppo_row(rng, i) for i in range(80)]}


def make_ppo_row(rng, i):
    """Of rollout i + 1, whose policy had learned from i."""
    kl = 4.5 * (1 - math.exp(-i / 30)) + (abs(rng.gauss(0, 0.08)) if i else 0)
    row = {
        "step": i + 1,
        "score_mean": 1.5 * (1 - math.exp(-i / 18)) + rng.gauss(0, 0.05),
        "gold_mean": 0.56 + 0.3 * math.sin(min(i, 75) / 33) + rng.gauss(0, 0.012),
    }
    row |= {"kl": kl, "entropy": 0.9 * math.exp(-i / 60), "length_mean": 15 + rng.gauss(0, 0.4), "eos_rate": 1 - abs(rng.gauss(0, 0.003))}
    row |= {"policy_loss": rng.gauss(-0.01, 0.004), "value_loss": 0.2 * math.exp(-i / 15) + 0.05 + rng.gauss(0, 0.01), "ok": True}
    return row


def hand_made_samples():
    """Five prompts and three policies whose figures can be worked out in the head: PPO wins three against SFT, ties one, loses one."""
    gold = {"sft": [0.2, 0.4, 0.6, 0.8, 0.5], "best_of_4": [0.9, 0.4, 0.7, 0.9, 0.5], "ppo": [0.9, 1.0, 0.7, 0.8, 0.1]}
    same = {"sft": {"proxy": -0.25, "kl": 0.0, "length": 10}, "best_of_4": {"proxy": 0.5, "kl": None, "length": 11},
            "ppo": {"proxy": 1.5, "kl": 4.0, "length": 12}}  # fmt: skip
    rows = []
    for i, family in enumerate(["sums", "sums", "facts", "facts", "facts"]):
        answers = {
            name: {"text": f"The {name} answer.", "gold": scores[i], "judge": scores[i], "ended": True, **same[name]} for name, scores in gold.items()
        }
        rows.append({"prompt": [{"role": "user", "content": f"Question {i + 1}?"}], "family": family, "id": str(i), "answers": answers})
    rows[4]["answers"]["sft"]["text"] = "The Zebra."
    return rows


def make_report(folder, samples=None, curves=(), policies=None, **settings):
    samples = make_samples(60) if samples is None else samples
    summary = summarise(samples, settings.pop("judge", "gold"), policies or POLICIES, **settings)
    summary["run"] = {
        "folder": "runs/quickstart",
        "seed": 1,
        "temperature": 0.7,
        "commit": "3f2c9a1",
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    }
    write_report(folder, summary, samples, dict(curves), "quickstart, seed 1")
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8"), summary


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; keeps ids, references, scripts and visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.scripts, self.texts, self.attributes = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self._keep(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open or tag in VOID, f"<{tag}/> means nothing in HTML"
        self._keep(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
        elif self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def _keep(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")]

    @property
    def text(self):
        return "".join(self.texts)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    html, markdown, summary = make_report(tmp_path_factory.mktemp("report"), curves=make_curves())
    return Page(html), html, markdown, summary


# --- what it says ---------------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_in_both_documents(full):
    page, html, markdown, summary = full
    assert markdown.splitlines()[0] == f"# {headline(summary)}"
    claim = headline(summary).split(":")[0]
    assert f"<h1>{claim}<span>" in html
    assert ("meta", "content", headline(summary)) in page.attributes


def test_E2_the_first_line_says_that_the_judge_is_the_training_reward(tmp_path):
    html, markdown, _ = make_report(tmp_path, judge="reward model", proxy_is_judge=True)
    assert markdown.startswith("# Judged by the very reward that PPO was trained on")
    assert "<h1>Judged by the very reward" in html


def test_every_figure_of_the_summary_stands_in_the_tables(full):
    page, _, markdown, summary = full
    for figures in summary["policies"].values():
        for text in (f"{figures['gold_mean']:.3f}", f"{figures['length_mean']:.1f}", f"{figures['distinct_2']:.3f}"):
            assert text in page.text
            assert text in markdown
    for row in summary["comparisons"]:
        interval = f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        assert interval in page.text
        assert counts in page.text
        assert interval in markdown
        assert counts in markdown


def test_each_interval_is_drawn_where_its_figures_say(full):
    _, html, _, summary = full
    drawn = re.findall(r'class="range" style="left: ([\d.]+)%; width: ([\d.]+)%"></i><i class="mark" style="left: ([\d.]+)%', html)
    expected = [(100 * low, 100 * (high - low), 100 * row["win_rate"]) for row in summary["comparisons"] for low, high in [row["ci95"]]]
    assert [tuple(map(float, one)) for one in drawn] == [pytest.approx(one, abs=0.006) for one in expected]


def test_families_carry_their_gold_means(full):
    _, html, markdown, summary = full
    assert len(summary["by_family"]) == len(FAMILIES)
    for family, entry in summary["by_family"].items():
        sft, ppo = (entry["policies"][name]["gold_mean"] for name in ("sft", "ppo"))
        assert f"| {family} | {entry['n']} | {sft:.2f} | {ppo:.2f} |" in markdown
        assert f'<i style="width: {100 * sft:.1f}%; --c: var(--sft)"></i><i style="width: {100 * ppo:.1f}%; --c: var(--ppo)"></i>' in html


@pytest.mark.parametrize(("steps", "ticks"), [([1, 2], ["1", "2"]), ([0, 1, 2, 3], ["0", "1", "2", "3"]), ([0, 10, 20], None), ([1000, 2000], None)])
def test_few_steps_have_whole_numbers_on_their_axis(steps, ticks):
    svg = line_chart("a", "a", [Series("a", steps, [0.1 * step for step in steps])], "rollouts before", ylabel="b")
    x_axis = svg[: svg.index(">rollouts before<")]
    found = re.findall(r"<text[^>]*>([^<]+)</text>", x_axis)
    assert found and all(float(tick).is_integer() for tick in found) and found == (ticks or found)


def test_axes_of_anything_else_keep_their_fractions():
    assert ">0.5<" in line_chart("a", "a", [Series("a", [0.25, 0.75], [1, 2])], "difference of the two scores")


def test_every_stage_has_its_charts(full):
    _, html, markdown, _ = full
    charted = re.findall(r"<figure><h3><small>(.*?)</small> (.*?)</h3>", html)
    assert charted[:4] == [
        ("Pretraining", "Loss"),
        ("SFT", "Loss"),
        ("Reward model", "Loss"),
        ("Reward model", "Accuracy on preference pairs"),
    ]
    assert [stage for stage, _ in charted[4:]] == ["PPO"] * 8
    assert html.count("<svg ") == len(charted) + 3 + 1  # three histograms and gold against proxy
    assert "| accuracy |" in markdown


def test_how_it_was_measured_is_told(full):
    page, _, markdown, _ = full
    for words in ("3f2c9a1", "0.7", "versions torch", "2.13.0", "60 held-out prompts", "Wilson", "not of other training seeds"):
        assert words in page.text
        assert words in markdown


def test_a_gold_judge_is_said_to_be_what_the_raters_rank_by(tmp_path):
    """No stage is trained on it, but the preferences come from it: a reader must know both."""
    said = "No stage was trained on it. The simulated raters of the preferences rank by it too, with noise."
    _, markdown, _ = make_report(tmp_path, judge="gold")
    assert said in markdown and "by which simulated raters rank with noise" in markdown
    _, markdown, _ = make_report(tmp_path, judge="judge")
    assert "No stage was trained on it." in markdown and "raters of the preferences" not in markdown


def test_R6_how_sure_the_reward_model_is_of_held_out_pairs_is_drawn_and_listed(tmp_path):
    samples = make_samples(60)
    summary = summarise(samples, "gold", POLICIES)
    summary["proxy_held_out"] = {
        "accuracy": 0.7, "ci95": [0.6, 0.8], "pairs": 50, "longer_wins_accuracy": 0.5,
        "by_margin": [{"margin_from": 0.0, "margin_to": 0.5, "pairs": 25, "accuracy": 0.56},
                      {"margin_from": 0.5, "margin_to": 2.25, "pairs": 25, "accuracy": 0.84}],
        "calibration": [{"predicted": 0.55, "observed": 0.53, "pairs": 30}, {"predicted": 0.81, "observed": 0.9, "pairs": 20}]}
    curves = {"reward": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}], "ppo": [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 0.5}]}
    write_report(tmp_path, summary, samples, curves, "of a test")
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert html.count("Right on held-out pairs, by margin</") == html.count("Calibration on held-out pairs</") == 1
    assert "| margin 0.00 to 0.50 | 25 | 0.56 |\n| margin 0.50 to 2.25 | 25 | 0.84 |" in markdown
    assert "| predicted 0.55 | 30 | 0.53 |\n| predicted 0.81 | 20 | 0.90 |" in markdown
    assert markdown.index("## Training: Reward model") < markdown.index("| held-out pairs |") < markdown.index("## Training: PPO")


def test_the_tiles_are_the_figures_of_the_summary(tmp_path):
    html, _, summary = make_report(tmp_path, hand_made_samples(), policies=["sft", "best_of_4", "ppo"])
    tiles = re.findall(r'<dt>([^<]*)</dt><dd class="value">(.*?)</dd><dd class="note">(.*?)</dd>', html)
    low, high = summary["comparisons"][0]["ci95"]
    assert tiles == [
        ("Win rate", "0.70", f"PPO against SFT; 95 % interval {low:.2f} to {high:.2f}"),  # (3 + 1/2) / 5
        ("Gold score", "0.50 → 0.70", "mean, SFT → PPO"),
        ("Reward", "−0.25 → 1.50", "mean, SFT → PPO"),
        ("KL", "4.0", "nats per completion away from SFT"),
        ("Length", "1.20 ×", "10.0 → 12.0 tokens"),
    ]
    assert summary["comparisons"][0]["win_rate"] == 0.7
    ppo = summary["policies"]["ppo"]
    assert [ppo["gold_mean"], ppo["proxy_mean"], ppo["kl_mean"]] == pytest.approx([0.7, 1.5, 4.0])


def test_of_the_decided_is_the_share_of_the_prompts_that_are_no_ties(tmp_path):
    html, markdown, _ = make_report(tmp_path, hand_made_samples(), policies=["sft", "best_of_4", "ppo"])
    rows = re.findall(r'</i>([^<]*) against ([^<]*?)(?: <small>.*?)?</th>.*?data-label="Of the decided">(.*?)</td>', html, re.DOTALL)
    wanted = [("PPO", "SFT", 3, 1), ("PPO", "Best of 4", 1, 2), ("Best of 4", "SFT", 3, 0), ("SFT", "SFT", 0, 0)]  # won and lost, counted by hand
    decided = [(a, b, f"{won / (won + lost):.3f}" if won + lost else "–") for a, b, won, lost in wanted]
    assert rows == decided
    for a, b, share in decided:
        sanity = r" \(sanity check\)" if a == b else ""
        assert re.search(rf"^\| {a} against {b}{sanity} \|(?: [^|]* \|){{3}} {share} \|", markdown, re.MULTILINE)


# --- what it leaves out -----------------------------------------------------------------------------------------------------------


def test_without_gold_families_and_stages_nothing_stands_empty(tmp_path):
    samples = make_samples(30, families=False, gold=False)
    html, markdown, _ = make_report(tmp_path, samples, {"ppo": []}, judge="another reward model")
    page = Page(html)
    assert not {"families", "gold-and-proxy", "training"} & set(page.ids)
    assert not re.search(r"<figure>\s*</figure>|<tbody>\s*</tbody>|<div class=\"grid\">\s*</div>", html)
    assert html.count("<svg ") == 3  # reward, judge and length
    assert "Gold score" not in page.text
    assert "Gold" not in markdown
    assert "Judge" in page.text
    assert '<select name="family">' not in html
    assert {anchor[1:] for anchor in page.references if anchor.startswith("#")} <= set(page.ids)


def test_a_missing_stage_leaves_the_others(tmp_path):
    curves = make_curves()
    del curves["reward"], curves["ppo"]
    html, markdown, _ = make_report(tmp_path, make_samples(20), curves)
    assert re.findall(r"<figure><h3><small>(.*?)</small>", html) == ["Pretraining", "SFT"]
    assert "## Training: SFT" in markdown
    assert "## Training: Reward model" not in markdown


def test_rows_that_are_not_numbers_are_passed_over(tmp_path):
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": None},
        {"loss": 1.0},
        {"step": 4, "loss": 1.5, "eval_loss": 1.4},
    ]
    html, markdown, _ = make_report(tmp_path, make_samples(20), {"sft": rows, "pretrain": rows[:2]})
    assert "| loss | 2 | 1.5 |" in markdown
    assert "| eval\\_loss | – | 1.4 |" in markdown, "a single value is no change"
    assert "Pretraining" not in Page(html).text


def test_one_policy_and_one_prompt_still_make_a_page(tmp_path):
    html, markdown, _ = make_report(tmp_path, make_samples(1), {}, policies=["sft"])
    Page(html)
    assert markdown.startswith("# Nothing was compared")


def test_a_later_round_is_named(tmp_path):
    html, _, _ = make_report(tmp_path, make_samples(20), {"ppo_2": [{"step": 0, "kl": 0.0}, {"step": 1, "kl": 0.1}]})
    assert "<small>PPO, round 2</small>" in html


# --- that it is safe and stands alone -----------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_from_outside(full):
    page, html, _, _ = full
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_every_colour_has_a_value(full):
    _, html, _, _ = full
    assert "#fe01" not in html  # a placeholder colour that was not replaced
    assert set(re.findall(r"var\(--([\w-]+)", html)) - {"c"} <= set(re.findall(r"--([\w-]+):", html))


def test_what_a_model_writes_is_shown_and_never_markup(tmp_path):
    samples = make_samples(20)
    for row in samples:
        row["answers"]["ppo"]["text"] = ATTACK
        row["prompt"].append({"role": "<b>user", "content": "```\n# no heading\n<script>x</script>"})
        row["family"] = '"><script>family'
    html, markdown, _ = make_report(tmp_path, samples)
    page = Page(html)
    assert page.text.count(ATTACK) == 20
    assert len(page.scripts) == 1
    assert "onerror" not in page.scripts[0]
    assert not [one for one in page.attributes if one[1].startswith("on")]
    assert ("article", "data-family", '"><script>family') in page.attributes
    assert "\n````text\n```\n# no heading" in markdown
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside


def test_only_the_script_whose_hash_is_named_may_run(full):
    page, html, _, _ = full
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_any_language_and_any_character_survives(tmp_path):
    samples = make_samples(20)
    samples[0]["prompt"][0]["content"] = "法国的首都是哪里?"
    for row in samples:
        row["answers"]["ppo"]["text"] = "法国的首都是巴黎。\r\nsecond line"
        row["answers"]["sft"]["text"] = "\x1b[31mred\x00 \ud800 \x9b"
    html, markdown, _ = make_report(tmp_path, samples)
    assert Page(html).text.count("法国的首都是巴黎。\nsecond line") == 20
    assert "法国的首都是哪里?" in html
    assert "法国的首都是哪里?" in markdown
    assert "␛[31mred␀ \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html + markdown)


def test_the_same_input_gives_the_same_bytes(tmp_path, full):
    _, html, markdown, _ = full
    assert make_report(tmp_path, curves=make_curves())[:2] == (html, markdown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


# --- samples and charts ---------------------------------------------------------------------------------------------------------------


def test_samples_are_balanced_and_do_not_depend_on_their_order():
    samples = make_samples(500)
    summary = summarise(samples, "gold", POLICIES)
    chosen = pick_samples(samples, summary)
    shuffled = copy.copy(samples)
    random.Random(5).shuffle(shuffled)
    assert pick_samples(shuffled, summary) == chosen
    assert len(chosen) == len({row["id"] for row in chosen}) == 20
    counts = [sum(row["family"] == family for row in chosen) for family in FAMILIES]
    assert set(counts) == {1, 2}
    scores = [row["answers"] for row in chosen]
    wins = sum(answers["ppo"]["judge"] > answers["sft"]["judge"] for answers in scores)
    losses = sum(answers["ppo"]["judge"] < answers["sft"]["judge"] for answers in scores)
    assert min(wins, losses, 20 - wins - losses) >= 6


def test_few_samples_are_all_shown():
    samples = make_samples(7)
    assert len(pick_samples(samples, summarise(samples, "gold", POLICIES))) == 7


def test_running_mean_by_hand():
    assert running_mean([0, 3, 6, 9, 0], 1) == [0, 3, 6, 5, 0]
    assert running_mean([0, 3, 6, 9, 2], 9) == [0, 3, 4, pytest.approx(17 / 3), 2]
    assert running_mean([1, 2], 0) == [1, 2]


def test_axis_labels_keep_their_digits(tmp_path):
    rows = [{"step": i, "policy_loss": 0.0001 * i} for i in range(6)]
    html, _, _ = make_report(tmp_path, make_samples(20), {"ppo": rows})
    assert ">0.0002</text>" in html


def test_gold_against_proxy_names_the_peak(tmp_path):
    rows = [{"step": i + 1, "score_mean": i, "gold_mean": gold, "kl": i**2} for i, gold in enumerate([0.5, 0.7, 0.9, 0.6])]
    html, markdown, _ = make_report(tmp_path, make_samples(20), {"ppo": rows})
    assert "Gold was highest after rollout 2 (0.90, KL 4.0 nats) and ended at 0.60." in Page(html).text
    assert "On training prompts: Gold was highest after rollout 2" in markdown
    held_out = [row | {"eval_score_mean": 1.0, "eval_gold_mean": 0.4 + 0.1 * row["step"]} for row in rows]
    _, markdown, _ = make_report(tmp_path, make_samples(20), {"ppo": held_out})
    assert "On held-out prompts: Gold was highest after rollout 3 (0.80" in markdown


def chart(html, label):
    """The SVG of the chart that screen readers call by this."""
    return re.search(rf'<svg [^>]*aria-label="{re.escape(label)}".*?</svg>', html, re.DOTALL)[0]


def drawn_at(svg, pattern):
    """Where on the x axis things are drawn, in the axis's own unit: pixels of the lines or markers that fit, measured by the ticks."""
    ticks = re.findall(r'text-anchor: middle[^>]* x="([\d.]+)"[^>]*>([\d.]+)</text>', svg)
    (left, low), (right, high) = ((float(x), float(text)) for x, text in (ticks[0], ticks[-1]))
    pixels = [x for found in re.findall(pattern, svg) for x in re.findall(r"(?:[ML] |^)([\d.]+)", found)]
    return [low + (float(x) - left) / (right - left) * (high - low) for x in pixels]


def line(colour):
    return rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: {re.escape(colour)}; stroke-width: 1.[46]'


def marker(colour, more=""):
    """Those inside the axes: the legend's are not clipped."""
    return rf'<g clip-path="[^"]*">\s*<use [^>]*x="([\d.]+)"[^>]*fill: {re.escape(colour)}; stroke: [^;"]*{more}"'


def test_what_ppo_sampled_stands_where_its_policy_was(tmp_path):
    """A row's rollout and its evaluation come from the policy before the row's step, the closing evaluation from that after the last."""
    rows = [{"step": step, "kl": step / 10} for step in (1, 2, 3, 4)]
    rows[0]["eval_kl"], rows[2]["eval_kl"] = 0.0, 0.3
    curves = {"ppo": [*rows, {"step": 4, "eval_kl": 0.4}], "sft": [{"step": step, "loss": 1.0} for step in (1, 4)]}
    html, _, _ = make_report(tmp_path, make_samples(20), curves)
    svg = chart(html, "PPO: KL to SFT (nats per completion) by rollouts before")
    assert drawn_at(svg, line("var(--ppo)")) == pytest.approx([0, 1, 2, 3], abs=0.01)
    assert drawn_at(svg, line("currentColor")) == pytest.approx([0, 2, 4], abs=0.01)
    assert ">rollouts before</text>" in svg
    assert drawn_at(chart(html, "SFT: Loss by step"), line("var(--sft)")) == pytest.approx([1, 4], abs=0.01)


def test_a_stage_that_was_evaluated_once_shows_it(tmp_path):
    rows = [{"step": step, "accuracy": 0.5 + step / 100} for step in range(1, 9)]
    html, markdown, _ = make_report(tmp_path, make_samples(20), {"reward": [*rows, {"step": 8, "eval_accuracy": 0.625}]})
    svg = chart(html, "Reward model: Accuracy on preference pairs by step")
    assert drawn_at(svg, marker("currentColor")) == pytest.approx([8], abs=0.01)
    assert ">held-out: 0.625</text>" in svg
    assert ">training</text>" in svg
    assert "| eval\\_accuracy | – | 0.625 |" in markdown


def test_E4_gold_and_proxy_are_drawn_against_the_square_root_of_KL(tmp_path):
    rows = [{"step": i + 1, "score_mean": 0.0, "eval_kl": kl, "eval_score_mean": i, "eval_gold_mean": 0.5} for i, kl in enumerate([0, 1, 9])]
    html, _, _ = make_report(tmp_path, hand_made_samples(), {"ppo": rows}, policies=["sft", "best_of_4", "ppo"])
    svg = chart(html, "Reward and gold score against the square root of KL along PPO training")
    assert drawn_at(svg, line("var(--ppo)")) == pytest.approx(2 * [0, 1, 3], abs=0.01), "above and below"
    diamond = "; stroke-linejoin: miter"
    assert drawn_at(svg, marker("var(--sft)", diamond)) == pytest.approx([0, 0], abs=0.01)
    assert drawn_at(svg, marker("var(--best-of)", diamond)) == pytest.approx(2 * [0.7977], abs=0.01)  # sqrt(log 4 - 3/4)
    assert drawn_at(svg, marker("var(--ppo)", diamond)) == pytest.approx([2, 2], abs=0.01)  # sqrt 4
    assert re.findall(r"text-anchor: start[^>]*>(.*?)</text>", svg) == ["PPO along training", "SFT", "Best of 4", "PPO"]


def test_charts_can_be_read_on_a_phone(full):
    """A page of 390 px leaves a chart 327 (body 2 x 16, figure 2 x 15.4): no text in it may be smaller than 10 px."""
    _, html, _, _ = full
    charts = re.findall(r'<svg viewBox="0 0 ([\d.]+) .*?</svg>', html, re.DOTALL)
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", html)}
    assert len(charts) == html.count("<svg ")
    assert min(sizes) * 327 / max(map(float, charts)) >= 10


# --- the answers and their filter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin, winners", [(0.0, "PPO PPO PPO Tie SFT"), (0.15, "PPO PPO Tie Tie SFT")])
def test_every_card_says_who_won(tmp_path, margin, winners):
    html, markdown, _ = make_report(tmp_path, hand_made_samples(), policies=["sft", "best_of_4", "ppo"], tie_margin=margin)
    cards = re.findall(r'<article class="sample" data-family="(.*?)" data-winner="(.*?)">(.*?)</article>', html, re.DOTALL)
    told = {}
    for family, winner, card in cards:
        tags = re.search(r'<p class="tags"><span>(.*?)</span><span class="winner" style="--c: var\(--(.*?)\)">(.*?)</span></p>', card).groups()
        told[re.search(r'<div class="text" dir="auto">(.*?)</div>', card)[1]] = (family, winner, *tags)
    wanted = {}
    for i, winner in enumerate(winners.split()):
        family, tag = "sums" if i < 2 else "facts", winner if winner == "Tie" else f"{winner} won"
        wanted[f"Question {i + 1}?"] = (family, tag, family, {"PPO": "ppo", "SFT": "sft", "Tie": "ink"}[winner], tag)
        assert re.search(rf"### \d\. {family}, {tag}\n\nuser:\n\n```text\nQuestion {i + 1}", markdown)
    assert told == wanted


def test_the_filter_offers_what_the_cards_carry(full):
    """What the script compares, also where no browser is at hand to run it."""
    page, html, _, _ = full
    offered = {name: set(re.findall(pattern, html)) - {""} for name, pattern in
               (("winner", r'name="winner" value="(.*?)"'), ("family", r"<option>(.*?)</option>"))}  # fmt: skip
    assert offered == {name: {value for tag, key, value in page.attributes if (tag, key) == ("article", f"data-{name}")} for name in offered}
    assert set(re.findall(r'wanted\.get\("(\w+)"\)', page.scripts[0])) == {"text", *offered}
    assert '<input type="search" name="text"' in html


ASKED = [
    ({}, [1, 2, 3, 4, 5]),
    ({"winner": "PPO won"}, [1, 2, 3]),
    ({"winner": "Tie"}, [4]),
    ({"family": "facts"}, [3, 4, 5]),
    ({"winner": "PPO won", "family": "facts"}, [3]),
    ({"text": " zebra "}, [5]),
    ({"text": "question 2"}, [2]),
    ({"text": "zebra", "winner": "Tie"}, []),
]
ASKING = """
const form = document.getElementById("filter");
document.body.dataset.found = JSON.stringify(ASKED.map((asked) => {
  form.reset();
  for (const [name, value] of Object.entries(asked)) form.elements[name].value = value;
  form.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("article.sample")].filter((card) => card.offsetHeight > 0);
  return [shown.map((card) => card.querySelector(".message .text").textContent), form.querySelector("output").textContent];
}));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to run the page's script")
def test_the_filter_shows_the_cards_that_fit_and_no_others(tmp_path):
    html, _, _ = make_report(tmp_path, hand_made_samples(), policies=["sft", "best_of_4", "ppo"])
    script = ASKING.replace("ASKED", json.dumps([asked for asked, _ in ASKED]))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ").replace("</body>", f"<script>{script}</script></body>")
    (tmp_path / "asked.html").write_text(html, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    page = subprocess.run([*command, (tmp_path / "asked.html").as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(unescape(re.search(r'data-found="(.*?)"', page)[1]))
    for (asked, numbers), (shown, said) in zip(ASKED, found, strict=True):
        assert sorted(shown) == [f"Question {number}?" for number in numbers], asked
        assert said == (f"{len(numbers)} of 5 shown" if numbers else "No sample fits."), asked
