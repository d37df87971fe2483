"""Charts for HTML reports: matplotlib figures as inline SVG that takes its colours and fonts from the page around it.

Figures are drawn in placeholder colours, which are then replaced by CSS variables: one picture serves light, dark and print. The same
input gives the same bytes (fixed id salt, no dates). Colours are slots, not values: `rlhf/report.css` says what ``--sft`` looks like.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib.style
from matplotlib.figure import Figure

from rlhf.paths import PACKAGE

INK = "ink"  # text, axes and grid: the page's own text colour
SLOTS = (INK, "pretrained", "sft", "best-of", "ppo", "extra-1", "extra-2", "extra-3")
KNOWN_SLOTS = {"pretrained": "pretrained", "sft": "sft", "ppo": "ppo", "ppo_last": "extra-1"}

WIDTH, HEIGHT = 3.4, 2.1  # inches, the width of every chart; small, so that 8-point text stays legible where a phone shows the whole chart
STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, and Chinese needs no font here
    "svg.hashsalt": "rlhf",
    "axes.formatter.useoffset": False,
    "text.parse_math": False,
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart: points in drawing order, the colour slot, and whether its points are marked (few, held-out figures)."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    slot: str = "sft"
    marked: bool = False


def slots_of(policies: Sequence[str]) -> dict[str, str]:
    """The colour slot of each policy, the same in every chart and table of a report."""
    spare = iter(["extra-2", "extra-3"] * len(policies))
    return {name: KNOWN_SLOTS.get(name) or ("best-of" if name.startswith("best_of_") else next(spare)) for name in policies}


def line_chart(name: str, title: str, series: Sequence[Series], xlabel: str = "step", reference: float | None = None,
               ylabel: str | None = None) -> str:
    """Lines over steps as SVG; long noisy lines are thin with their running mean on top. ``reference``: a dashed level such as chance."""
    with _page_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        if reference is not None:
            axes.axhline(reference, color=_colour(INK), alpha=0.5, linewidth=0.8, dashes=(4, 3))
        for line in series:
            _draw_line(axes, line)
        if all(float(x).is_integer() for line in series for x in line.xs):  # there is no step 1.25
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(series), borderpad=0, handlelength=1.4)
        return _svg(figure, name, title)


def _draw_line(axes, line: Series) -> None:
    color = _colour(line.slot)
    if len(line.ys) == 1:
        axes.plot(line.xs, line.ys, color=color, label=line.label, linestyle="", marker="o", markersize=5)
    elif line.marked:
        axes.plot(line.xs, line.ys, color=color, label=line.label, linewidth=1.6, marker="o", markersize=3)
    elif len(line.ys) < 60:
        axes.plot(line.xs, line.ys, color=color, label=line.label, linewidth=1.6)
    else:
        axes.plot(line.xs, line.ys, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(line.xs, running_mean(line.ys, len(line.ys) // 25), color=color, label=line.label, linewidth=1.6)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Each value's mean with its neighbours up to ``reach`` steps away on both sides, as far as the ends leave equally many."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(math.fsum(values[i - near : i + near + 1]) / (2 * near + 1))
    return means


def histograms(name: str, title: str, values: dict[str, Sequence[float]], labels: dict[str, str], slots: dict[str, str]) -> str:
    """One histogram for each policy, one above the other on the same axis, with a dot at the mean.

    The axis holds all but the outermost half per cent on each side; what lies beyond is counted in the first and last bar.
    """
    pooled = sorted(value for column in values.values() for value in column)
    low, high = pooled[int(0.005 * (len(pooled) - 1))], pooled[math.ceil(0.995 * (len(pooled) - 1))]
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = _edges(pooled, low, high)
    with _page_style({"axes.spines.left": False}):
        figure = Figure(figsize=(WIDTH, 0.4 + 0.42 * len(values)), layout="constrained")
        rows = figure.subplots(len(values), sharex=True, squeeze=False)[:, 0]
        for axes, (policy, column) in zip(rows, values.items(), strict=True):
            color, mean = _colour(slots[policy]), min(max(math.fsum(column) / len(column), low), high)
            clipped = [min(max(value, low), high) for value in column]
            axes.hist(clipped, bins=edges, color=color, alpha=0.75)
            axes.plot([mean], [0], marker="o", markersize=5, color=color, clip_on=False, markeredgecolor=_colour(INK), markeredgewidth=0.8)
            axes.set_ylabel(labels[policy], rotation=0, ha="right", va="center")
            axes.set_yticks([])
            axes.grid(False)
        return _svg(figure, name, title)


def _edges(pooled: Sequence[float], low: float, high: float) -> list[float]:
    """Edges of some 30 bins; for whole numbers each bin holds equally many of them, or the bars would form a comb."""
    if all(float(value).is_integer() for value in pooled):
        width, start = max(1, math.ceil((high - low) / 30)), math.floor(low) - 0.5
        return [start + width * i for i in range(math.ceil((high + 0.5 - start) / width) + 1)]
    return [low + (high - low) * i / 30 for i in range(31)]


def over_optimisation(
    name: str, title: str, proxy: Series, gold: Series, marks: Sequence[tuple[str, float, float, float, str]] = ()
) -> str:
    """Proxy reward above, gold score below, both against the square root of KL along training (Gao et al. 2022, figure 1).

    Points are joined in the order of training, and a large dot ends them. marks: (label, sqrt(KL), proxy, gold, slot) of other policies.
    """
    with _page_style():
        figure = Figure(figsize=(WIDTH, HEIGHT * 1.7), layout="constrained")
        rows = figure.subplots(2, sharex=True)
        for axes, line, height in zip(rows, (proxy, gold), (2, 3), strict=True):
            axes.plot(line.xs, line.ys, color=_colour(line.slot), linewidth=1.4, marker="o", markersize=2, label="PPO along training")
            axes.plot(line.xs[-1:], line.ys[-1:], color=_colour(line.slot), marker="o", markersize=6)
            for mark in marks:
                axes.plot([mark[1]], [mark[height]], linestyle="", marker="D", markersize=5, color=_colour(mark[4]), label=mark[0])
            axes.set_ylabel(line.label)
        figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, borderpad=0, handlelength=1.0, columnspacing=1.1)
        rows[1].set_xlabel("√KL to SFT (KL in nats per completion)")
        return _svg(figure, name, title)


# --- from a figure to SVG that belongs to the page ------------------------------------------------------------------------------


def _colour(slot: str) -> str:
    """A colour that nothing else uses, to be found again in the SVG text."""
    return f"#fe01{SLOTS.index(slot):02x}"


def _page_style(more: dict | None = None):
    """Context in which figures are drawn: matplotlib's defaults, whatever the user's own settings are, and ours on top."""
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return matplotlib.style.context(["default", STYLE | dict.fromkeys(keys, _colour(INK)) | (more or {})])


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element: page colours and fonts, ids made unique by ``name``, ``title`` for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()  # no XML prolog inside HTML
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", _opening(title), text, count=1)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # only clip paths and markers are referred to; their ids stay, made unique
    text = text.replace("xlink:href", "href").replace(' id="', f' id="{name}-')
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    text = re.sub(r" d=\"[^\"]*\"", lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), text)
    for slot in SLOTS:
        text = text.replace(_colour(slot), "currentColor" if slot == INK else f"var(--{slot})")
    return text


def _opening(title: str):
    label = escape(title, quote=True)
    return lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">'


def standalone(svg: str) -> str:
    """A chart as a file of its own, on white, in the report's colours."""
    css = (PACKAGE / "report.css").read_text(encoding="utf-8")
    colours = {slot: re.search(rf"--{slot}: (#\w+)", css)[1] for slot in SLOTS if slot != INK}  # the first ones: of the light page
    style = "".join(f"--{slot}:{colour};" for slot, colour in colours.items())
    return svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;color:#222;--sans:sans-serif;{style}" ', 1) + "\n"
