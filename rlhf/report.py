"""The comparison's report: ``report.md``, and ``report.html``, one self-contained page that needs no network.

`write_report` gathers what the page shows into plain values; how it looks stands in ``report.html.j2``, ``report.css`` and ``report.js``
beside this file. Text from models and data is material, never markup: Jinja escapes all of it, control characters are made visible, and
the page's own policy forbids every script but the one whose hash it names.
"""

import base64
import hashlib
import math
import re
from collections import Counter
from html import escape
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlhf import charts
from rlhf.alarms import history
from rlhf.comparison import COOLED, SANITY, caveats, headline, is_sanity, judge_on_pairs, label, length_ratio, main_comparison
from rlhf.jsonl import replacing

HERE = Path(__file__).resolve().parent
N_SAMPLES = 20

STAGE_TITLES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "Reward model", "ppo": "PPO"}
STAGE_SLOTS = {"pretrain": "pretrained", "sft": "sft", "reward": "extra-2", "ppo": "ppo"}

# Chart title, the figures of metrics.jsonl in it, and a level to draw. A stage gets the charts whose figures it has.
ON_TRAINING, HELD_OUT = "training", "held-out"
PANELS = (
    ("Loss", {"loss": ON_TRAINING, "eval_loss": HELD_OUT}, None),
    ("Accuracy on preference pairs", {"accuracy": ON_TRAINING, "eval_accuracy": HELD_OUT}, 0.5),
    ("Reward (proxy)", {"score_mean": ON_TRAINING, "eval_score_mean": HELD_OUT}, None),
    ("Gold score", {"gold_mean": ON_TRAINING, "eval_gold_mean": HELD_OUT}, None),
    ("KL to SFT (nats per completion)", {"kl": ON_TRAINING, "eval_kl": HELD_OUT}, None),
    ("Entropy (nats per token)", {"entropy": ON_TRAINING}, None),
    ("Length (tokens)", {"length_mean": ON_TRAINING, "eval_length_mean": HELD_OUT}, None),
    ("Answers that end by themselves", {"eos_rate": ON_TRAINING}, None),
    ("Policy loss", {"policy_loss": ON_TRAINING}, None),
    ("Value loss", {"value_loss": ON_TRAINING}, None),
)

# Key of a policy in summary.json, heading, digits, and what the figure means.
COLUMNS = (
    ("gold_mean", "Gold score", 3, "the score by the known rubric, by which simulated raters rank with noise; no stage was trained on it; mean"),
    ("proxy_mean", "Reward", 2, "the score by the run's reward model (the proxy), 0 and 1 being SFT's mean and spread on training prompts"),
    ("judge_mean", "Judge", 2, "the score by the judge that decides the wins; mean over prompts"),
    ("kl_mean", "KL to SFT", 2, "how far the policy has moved from SFT, in nats per completion; log n - (n-1)/n for best of n"),
    ("length_mean", "Length", 1, "tokens per answer, mean"),
    ("eos_rate", "EOS rate", 3, "share of the answers that end by themselves instead of being cut off"),
    ("distinct_2", "Distinct-2", 3, "different pairs of neighbouring words over all such pairs: low when a policy repeats itself"),
)

JUDGES = {
    "gold": "the gold score, a rubric computed from the text",
    "judge": "a reward model of its own, trained on prompts that stage 2 never saw",
    "proxy": "the run's reward model",
}

IN_CONTEXT = ("Tasks of the embedded world with solved examples of the same kind in front. Right: the share of answers that are correct, whatever "
              "their form. Against SFT: difference of the gold score with as many examples; below zero it is what alignment costs.")
IN_CONTEXT_HEADS = ["policy", "examples", "gold score", "right", "against SFT", "95 % interval"]


def write_report(folder: Path, summary: dict, samples: list[dict], curves: dict[str, list[dict]], title: str) -> None:
    """Write ``report.md`` and ``report.html`` into ``folder``, each beside and renamed into place; the same input gives the same bytes.

    summary: `rlhf.comparison.summarise`, plus ``summary["run"]`` (config, commit, seed, versions ...), shown as it is.
    samples: the lines of ``samples.jsonl``. curves: stage name -> rows of its ``metrics.jsonl``; what is missing is left out.
    """
    page = _gather(summary, samples, curves, title)
    for name, text in (("report.md", _markdown(page)), ("report.html", _html(page))):
        with replacing(Path(folder) / name) as file:
            file.write(text)


def _gather(summary: dict, samples: list[dict], curves: dict[str, list[dict]], title: str) -> dict:
    """Everything the two documents show, as plain values in the order of the page."""
    slots = charts.slots_of(list(summary["policies"]))
    real = {name: slot for name, slot in slots.items() if name not in SANITY}  # the others are there for one figure
    columns = _columns(summary)
    drawn = {name: by_rollouts_before(rows) if name.startswith("ppo") else rows for name, rows in curves.items()}
    shown = [_sample(row, summary, real) for row in pick_samples(samples, summary)]
    return {
        "title": title,
        "headline": headline(summary),
        "caveats": caveats(summary) + history(curves.get("ppo", [])),
        "tiles": _tiles(summary),
        "columns": [{"heading": heading, "meaning": meaning} for _, heading, _, meaning in columns],
        "policies": _policy_rows(summary, columns, slots),
        "comparisons": [_comparison_row(row, slots) for row in summary["comparisons"]],
        "in_context": _in_context_rows(summary, slots),
        "over_optimisation": _over_optimisation(summary, drawn.get("ppo", []), slots),
        "families": _family_rows(summary),
        "family_policies": [{"label": label(name), "slot": slots[name]} for name in ("sft", "ppo") if name in slots],
        "histograms": _histograms(summary, samples, real),
        "stages": [stage for name, rows in drawn.items()
                   if (stage := _stage(name, rows, summary.get("proxy_held_out") if name == "reward" else None))["charts"]],
        "samples": shown,
        "winners": sorted({sample["winner"] for sample in shown}),
        "sample_families": sorted({sample["family"] for sample in shown} - {""}),
        "n_prompts": summary["n_prompts"],
        "judge": summary["judge"],
        "in_context_note": IN_CONTEXT,
        "method": _method(summary),
        "run": _flat(summary.get("run", {})),
    }


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.lstrip("-")


# --- tables -------------------------------------------------------------------------------------------------------------------


def _columns(summary: dict) -> list[tuple]:
    """The policy table's columns: those that some policy has, and the judge only where it is neither gold nor proxy."""
    needless = {"judge_mean"} if summary["judge"] in ("gold", "proxy") else set()
    given = {key for figures in summary["policies"].values() for key, value in figures.items() if value is not None}
    return [column for column in COLUMNS if column[0] in given - needless]


def _policy_rows(summary: dict, columns: list[tuple], slots: dict[str, str]) -> list[dict]:
    return [
        {"label": label(name), "slot": slots[name], "figures": [_number(figures.get(key), digits) for key, _, digits, _ in columns]}
        for name, figures in summary["policies"].items()
    ]


def _comparison_row(row: dict, slots: dict[str, str]) -> dict:
    (low, high), held = row["ci95"], row.get("length_controlled_ci95")
    return {
        "a": label(row["a"]),
        "b": label(row["b"]),
        "slot": slots[row["a"]],
        "sanity": is_sanity(row["a"], row["b"]),
        "win_rate": _number(row["win_rate"], 3),
        "interval": f"{low:.3f} to {high:.3f}",
        "left": f"{100 * low:.2f}%",
        "width": f"{100 * (high - low):.2f}%",
        "at": f"{100 * row['win_rate']:.2f}%",
        "counts": f"{row['wins']} / {row['ties']} / {row['losses']}",
        "decided": _number(row.get("decided_win_rate"), 3),
        "controlled": _number(row["length_controlled_win_rate"], 3) + ("" if held is None else f" ({held[0]:.3f}-{held[1]:.3f})"),
    }


def _in_context_rows(summary: dict, slots: dict[str, str]) -> list[dict]:
    """A row for each policy and number of solved examples (CANON E6); none where compare.shots was empty."""
    rows = []
    for row in summary.get("in_context", {}).get("rows", []):
        low, high = row.get("ci95", (None, None))
        rows.append({
            "label": label(row["policy"]), "slot": slots[row["policy"]], "shots": str(row["shots"]), "gold": _number(row["gold_mean"], 3),
            "correct": _number(row["correct_mean"], 3), "change": _number(row.get("against_sft"), 3),
            "interval": _number(None, 3) if low is None else f"{_number(low, 3)} to {_number(high, 3)}",
        })  # fmt: skip
    return rows


def _family_rows(summary: dict) -> list[dict]:
    """Gold means of SFT and PPO for each family, the greatest gain first; none without families or without a gold score in [0, 1]."""
    rows = []
    for family, entry in summary.get("by_family", {}).items():
        sft, ppo = (entry["policies"].get(name, {}).get("gold_mean") for name in ("sft", "ppo"))
        if sft is None or ppo is None or not (0 <= sft <= 1 and 0 <= ppo <= 1):
            continue
        rows.append({"family": family, "n": entry["n"], "sft": _number(sft, 2), "ppo": _number(ppo, 2), "gain": ppo - sft})
        rows[-1]["change"] = ("+" if ppo >= sft else "") + _number(ppo - sft, 2)
        rows[-1]["widths"] = [f"{100 * sft:.1f}%", f"{100 * ppo:.1f}%"]
    return sorted(rows, key=lambda row: (-row["gain"], row["family"]))


def _tiles(summary: dict) -> list[dict]:
    """The handful of figures to take away, each as name, value, and a line of explanation."""
    row = main_comparison(summary)
    if row is None:
        return []
    a, b, name = summary["policies"][row["a"]], summary["policies"][row["b"]], f"{label(row['a'])} against {label(row['b'])}"
    low, high = row["ci95"]
    tiles = [("Win rate", _number(row["win_rate"], 2), f"{name}; 95 % interval {low:.2f} to {high:.2f}")]
    for key, title in (("gold_mean", "Gold score"), ("proxy_mean", "Reward")):
        if None not in (a[key], b[key]):
            tiles.append((title, f"{_number(b[key], 2)} → {_number(a[key], 2)}", f"mean, {label(row['b'])} → {label(row['a'])}"))
    if a["kl_mean"] is not None:
        tiles.append(("KL", _number(a["kl_mean"], 1), "nats per completion away from SFT"))
    ratio = length_ratio(summary, row)
    if ratio is not None:
        tiles.append(("Length", f"{ratio:.2f} ×", f"{_number(b['length_mean'], 1)} → {_number(a['length_mean'], 1)} tokens"))
    return [dict(zip(("name", "value", "note"), tile, strict=True)) for tile in tiles]


# --- charts -------------------------------------------------------------------------------------------------------------------


def _figures(rows: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of every row that has both as finite numbers, in the order given."""
    return [(row["step"], row[key]) for row in rows if _finite(row.get("step")) and _finite(row.get(key))]


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def by_rollouts_before(rows: list[dict]) -> list[dict]:
    """PPO's rows, each at the number of rollouts before its policy, so that one place on the axis is one policy.

    A row is logged after its step: what was sampled in it, for training or to evaluate, came from the policy before that step. The closing
    row has held-out figures alone, of the policy at the end.
    """
    moved = []
    for row in rows:
        closing = all(key.startswith("eval_") for key in row if key != "step")
        moved.append(row if closing else row | {"step": row["step"] - 1})
    return moved


def _stage(name: str, rows: list[dict], held_out: dict | None = None) -> dict:
    """A stage's charts: those panels that have a curve, of two points or more. A later round (``ppo_2``) looks like the first.

    held_out: of the reward model, what it got right on held-out pairs; how sure it was of them is drawn too (CANON R6).
    """
    base, _, round_ = re.sub(r"[^A-Za-z0-9]+", "_", name).partition("_")
    title = STAGE_TITLES.get(base, name) + (f", round {round_}" if base in STAGE_TITLES and round_ else "")
    axis = "rollouts before" if base == "ppo" else "step"
    found = []
    for number, (panel, keys, reference) in enumerate(PANELS):
        lines = [_line(how, points, STAGE_SLOTS.get(base, "extra-3")) for key, how in keys.items() if (points := _figures(rows, key))]
        if any(len(line.xs) > 1 for line in lines):
            svg = charts.line_chart(f"{base}{round_}-{number}", f"{title}: {panel} by {axis}", lines, axis, reference)
            found.append({"title": panel, "svg": Markup(svg)})
    return {"title": title, "charts": found + _sureness(held_out or {}), "figures": _ends(rows), "held_out": _sureness_rows(held_out or {})}


def _sureness(held_out: dict) -> list[dict]:
    """Charts of a reward model on held-out pairs: right by the margin between two scores, and what is observed where it predicts so much."""
    margins, bins, slot = held_out.get("by_margin") or [], held_out.get("calibration") or [], STAGE_SLOTS["reward"]
    middle = [(row["margin_from"] + row["margin_to"]) / 2 for row in margins]
    right = charts.Series("observed", middle, [row["accuracy"] for row in margins], slot, True)
    observed = charts.Series("observed", [row["predicted"] for row in bins], [row["observed"] for row in bins], slot, True)
    predicted = charts.Series("as predicted", [0.5, 1.0], [0.5, 1.0], charts.INK)
    found = []
    if len(margins) > 1:
        title = "Right on held-out pairs, by margin"
        svg = charts.line_chart("reward-margin", f"Reward model: {title}", [right], "difference of the two scores", 0.5)
        found.append({"title": title, "svg": Markup(svg)})
    if len(bins) > 1:
        title = "Calibration on held-out pairs"
        svg = charts.line_chart("reward-calibration", f"Reward model: {title}", [observed, predicted], "predicted share that is right")
        found.append({"title": title, "svg": Markup(svg)})
    return found


def _sureness_rows(held_out: dict) -> list[list[str]]:
    """The same for the document without pictures: what, how many pairs, and the share that is right."""
    margins = [[f"margin {row['margin_from']:.2f} to {row['margin_to']:.2f}", row["pairs"], f"{row['accuracy']:.2f}"]
               for row in held_out.get("by_margin") or []]
    return margins + [[f"predicted {row['predicted']:.2f}", row["pairs"], f"{row['observed']:.2f}"] for row in held_out.get("calibration") or []]


def _line(how: str, points: list[tuple[float, float]], slot: str) -> charts.Series:
    """A curve; of a single point (a stage evaluated once) a marker, and its value in the legend."""
    name = how if len(points) > 1 else f"{how}: {points[0][1]:.3f}"
    return charts.Series(name, *zip(*points, strict=True), charts.INK if how == HELD_OUT else slot, how == HELD_OUT)


def _ends(rows: list[dict]) -> list[dict]:
    """First and last value of every charted figure, for the document without pictures."""
    keys = [key for _, keys, _ in PANELS for key in keys]
    ends = [(key, [f"{value:.4g}" for _, value in _figures(rows, key)]) for key in keys]
    return [{"name": key, "first": values[0] if len(values) > 1 else "–", "last": values[-1]} for key, values in ends if values]


def _histograms(summary: dict, samples: list[dict], slots: dict[str, str]) -> list[dict]:
    labels = {name: label(name) for name in slots}
    found = []
    judge = () if summary["judge"] in ("gold", "proxy") else (("judge", "Judge"),)
    for key, title in (("gold", "Gold score"), ("proxy", "Reward (proxy)"), *judge, ("length", "Length (tokens)")):
        values = {name: [row["answers"][name][key] for row in samples] for name in slots}
        values = {name: column for name, column in values.items() if column and all(map(_finite, column))}
        if values:
            svg = charts.histograms(
                f"histogram-{key}", f"{title}: distribution over the prompts, one row for each policy", values, labels, slots
            )
            found.append({"title": title, "svg": Markup(svg)})
    return found


def _over_optimisation(summary: dict, rows: list[dict], slots: dict[str, str]) -> dict | None:
    """Gao's curve (CANON E4) from PPO's metrics: held-out figures where there are any, else those of the training prompts; None without gold."""
    for prefix in ("eval_", ""):
        kl_key = f"{prefix}kl" if any(f"{prefix}kl" in row for row in rows) else "kl"
        keys = (kl_key, f"{prefix}score_mean", f"{prefix}gold_mean")
        kept = [row for row in rows if all(_finite(row.get(key)) for key in ("step", *keys))]
        if len(kept) > 2:
            return _gao_curve(kept, keys, "held-out prompts" if prefix else "training prompts", _marks(summary, slots))
    return None


def _gao_curve(rows: list[dict], keys: tuple[str, str, str], prompts: str, marks: list[tuple]) -> dict:
    reach = len(rows) // 25 if len(rows) >= 60 else 0
    kl, proxy, gold = (charts.running_mean([row[key] for row in rows], reach) for key in keys)
    distance = [math.sqrt(max(value, 0.0)) for value in kl]
    title = "Reward and gold score against the square root of KL along PPO training"
    lines = [charts.Series("Reward (proxy)", distance, proxy, "ppo"), charts.Series("Gold score", distance, gold, "ppo")]
    best = max(range(len(gold)), key=gold.__getitem__)
    peak = f"Gold was highest after rollout {rows[best]['step']} ({gold[best]:.2f}, KL {kl[best]:.1f} nats) and ended at {gold[-1]:.2f}."
    return {"svg": Markup(charts.over_optimisation("over-optimisation", title, *lines, marks)), "prompts": prompts, "peak": peak}


def _marks(summary: dict, slots: dict[str, str]) -> list[tuple[str, float, float, float, str]]:
    """SFT, what is drawn from it, and PPO; the others may lie so far away that the curve would be a dot."""
    marks = []
    for name, figures in summary["policies"].items():
        values = [figures[key] for key in ("kl_mean", "proxy_mean", "gold_mean")]
        if None not in values and (name in ("sft", "ppo") or name.startswith("best_of_") or COOLED.fullmatch(name)):
            marks.append((label(name), math.sqrt(max(values[0], 0.0)), values[1], values[2], slots[name]))
    return marks


# --- samples ------------------------------------------------------------------------------------------------------------------


def pick_samples(samples: list[dict], summary: dict, n: int = N_SAMPLES) -> list[dict]:
    """``n`` prompts balanced over families and over who won; the choice depends on the prompts' ids alone, not on their order."""
    waiting: dict[tuple[str, str], list[dict]] = {}
    for row in sorted(samples, key=lambda row: hashlib.sha256(str(row.get("id")).encode("utf-8", "replace")).hexdigest()):
        waiting.setdefault((row.get("family") or "", _winner(row, summary)), []).append(row)
    families, winners, chosen = Counter(), Counter(), []
    while waiting and len(chosen) < n:
        kind = min(sorted(waiting), key=lambda kind: families[kind[0]] + winners[kind[1]])
        chosen.append(waiting[kind].pop(0))
        families[kind[0]] += 1
        winners[kind[1]] += 1
        if not waiting[kind]:
            del waiting[kind]
    return sorted(chosen, key=lambda row: (row.get("family") or "", str(row.get("id"))))


def _winner(row: dict, summary: dict) -> str:
    """The policy of the main comparison whose answer the judge's score puts first, or "tie"."""
    pair = main_comparison(summary)
    if pair is None:
        return "tie"
    a, b = (row["answers"][pair[side]]["judge"] for side in "ab")
    return "tie" if abs(a - b) <= summary.get("tie_margin", 0.0) else pair["a"] if a > b else pair["b"]


def _sample(row: dict, summary: dict, slots: dict[str, str]) -> dict:
    winner = _winner(row, summary)
    messages = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    return {
        "family": row.get("family") or "",
        "winner": "Tie" if winner == "tie" else f"{label(winner)} won",
        "slot": slots.get(winner, charts.INK),
        "messages": messages,
        "answers": [_answer(name, row["answers"][name], slots) for name in slots],
    }


def _answer(name: str, answer: dict, slots: dict[str, str]) -> dict:
    scores = [] if answer["gold"] is None else [f"gold {_number(answer['gold'], 2)}"]
    scores.append(f"reward {_number(answer['proxy'], 2)}")
    if answer["judge"] not in (answer["gold"], answer["proxy"]):
        scores.append(f"judge {_number(answer['judge'], 2)}")
    scores.append(f"{answer['length']} tokens")
    scores += [] if answer["ended"] else ["cut off"]
    return {"label": label(name), "slot": slots[name], "text": answer["text"], "scores": scores}


# --- how it was measured --------------------------------------------------------------------------------------------------------


def _method(summary: dict) -> list[str]:
    judge = JUDGES.get(summary["judge"], summary["judge"])
    independent = "PPO was trained on it." if summary.get("proxy_is_judge") else "No stage was trained on it."
    flips, held_out = summary.get("order_flips", 0), summary.get("judge_held_out")
    known = f" It {judge_on_pairs(held_out)}." if held_out else ""
    known += " The simulated raters of the preferences rank by it too, with noise." if summary["judge"] == "gold" else ""
    proxy, asked = summary.get("proxy_held_out"), f"{summary['n_prompts']}"
    asked += f" of {summary['n_held_out']}" if summary.get("n_held_out", 0) > summary["n_prompts"] else ""
    lines = [
        f"All policies answered the same {asked} held-out prompts. The judge is {judge}. {independent}{known}",
        *([f"The reward model {judge_on_pairs(proxy)}."] if proxy and proxy != held_out else []),
        "A win counts 1, a tie one half, a loss 0. The interval of their mean holds 95 % (Wilson's score interval, its variance lowered by ties).",
        "The interval speaks of other prompts, not of other training seeds.",
        "At equal length: a logistic regression of the outcome on the length difference, read at difference 0, and its 95 % interval; – where one "
        "side is nearly always the longer, which tells nothing of equal length.",
        f"Both orders of presentation: {flips} verdicts changed with the order and count as ties."
        if flips
        else "Order of presentation: no verdict changed with it (a judge that scores one answer at a time sees no order).",
    ]
    if summary.get("tie_margin"):
        lines.append(f"Scores that differ by at most {summary['tie_margin']} are ties.")
    return lines


def _flat(run: dict, prefix: str = "") -> list[dict]:
    rows = []
    for key, value in run.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append({"name": f"{prefix}{key}", "value": "–" if value is None else str(value)})
    return rows


# --- the two documents ----------------------------------------------------------------------------------------------------------


def visible(value):
    """Text fit to be shown: control characters as pictures, lone surrogates replaced; other values and our own markup as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), value.replace("\r\n", "\n"))
    return re.sub(r"[\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", value)


def rendered(template: Path, **values) -> str:
    """An HTML template filled with `values`, in which text of models and data is escaped and made visible; `css` is the reports' style."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=visible, trim_blocks=True, lstrip_blocks=True)
    css = (HERE / "report.css").read_text(encoding="utf-8")
    return environment.from_string(template.read_text(encoding="utf-8")).render(css=Markup(css), **values)


def _html(page: dict) -> str:
    js = (HERE / "report.js").read_text(encoding="utf-8")
    claim, colon, result = page["headline"].partition(": win rate")
    result = colon + re.sub(r"(\d)-(\d)", "\\1–\N{WORD JOINER}\\2", result)  # an interval is not broken over two lines
    digest = base64.b64encode(hashlib.sha256(js.encode("utf-8")).digest()).decode("ascii")
    return rendered(HERE / "report.html.j2", **page, claim=claim, result=result, js=Markup(js), js_hash=digest)


def _markdown(page: dict) -> str:
    parts = [f"# {_plain(page['headline'])}", _plain(page["title"]), _list(page["caveats"]), *_markdown_tables(page)]
    if page["over_optimisation"]:
        parts += ["## Gold against proxy", f"On {page['over_optimisation']['prompts']}: {page['over_optimisation']['peak']}"]
    for stage in page["stages"]:
        rows = [[row["name"], row["first"], row["last"]] for row in stage["figures"]]
        parts += [f"## Training: {_plain(stage['title'])}", _table(["figure", "first", "last"], rows)]
        parts += [_table(["held-out pairs", "pairs", "right"], stage["held_out"])] if stage["held_out"] else []
    parts += ["## Answers side by side", *(_markdown_sample(number, row) for number, row in enumerate(page["samples"], 1))]
    parts += ["## How it was measured", *map(_plain, page["method"]), _list(f"{row['name']}: {row['value']}" for row in page["run"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_tables(page: dict) -> list[str]:
    policies = [[row["label"], *row["figures"]] for row in page["policies"]]
    parts = ["## Policies", _table(["policy", *(column["heading"] for column in page["columns"])], policies)]
    parts += [_list(f"{column['heading']}: {column['meaning']}" for column in page["columns"])]
    heads = ["a against b", "win rate of a", "95 % interval", "won / tied / lost", "of the decided", "at equal length"]
    keys = ("win_rate", "interval", "counts", "decided", "controlled")
    compared = [[f"{row['a']} against {row['b']}{' (sanity check)' if row['sanity'] else ''}", *(row[key] for key in keys)]
                for row in page["comparisons"]]
    parts += ["## Comparisons", _table(heads, compared)] if compared else []
    shots = [[row[key] for key in ("label", "shots", "gold", "correct", "change", "interval")] for row in page["in_context"]]
    parts += ["## In-context learning", _plain(IN_CONTEXT), _table(IN_CONTEXT_HEADS, shots)] if shots else []
    families = [[row["family"], row["n"], row["sft"], row["ppo"], row["change"]] for row in page["families"]]
    parts += ["## Gold score by family", _table(["family", "prompts", "SFT", "PPO", "change"], families)] if families else []
    return parts


def _markdown_sample(number: int, sample: dict) -> str:
    kind = ", ".join(_plain(text) for text in (sample["family"], sample["winner"]) if text)
    parts = [f"### {number}. {kind}", *(f"{_plain(message['role'])}:\n\n{_fenced(message['content'])}" for message in sample["messages"])]
    parts += [f"**{_plain(answer['label'])}** ({', '.join(answer['scores'])})\n\n{_fenced(answer['text'])}" for answer in sample["answers"]]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    """A code block that the text cannot end: its fence is longer than any run of backticks inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{visible(text)}\n{fence}"


def _plain(text) -> str:
    """One line of Markdown that reads as the text itself: markup characters escaped, also those of HTML."""
    line = " ".join(escape(visible(str(text)), quote=False).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line)


def _list(texts) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


def _table(heads: list[str], rows: list[list]) -> str:
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
