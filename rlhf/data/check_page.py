"""The page of the data check (rlhf/data/check.py): one self-contained file without scripts, everything that comes from data escaped."""

from pathlib import Path

from markupsafe import Markup

from rlhf import charts
from rlhf.data.facts import Checked, Facts, answers_of, left_out
from rlhf.encoding import Encoder
from rlhf.jsonl import replacing
from rlhf.report import rendered

HERE = Path(__file__).resolve().parent
SLOTS = {"prompt": "pretrained", "chosen": "ppo", "rejected": "best-of", "completion": "ppo", "text": "ppo"}


def write_page(path: Path, checked: Checked, verdict: str, figures: list[list[tuple[str, str]]]) -> None:
    """Writes the page, beside and renamed into place; ``figures``: for each file the names and sentences that the terminal shows."""
    files = [_file(number, facts, lines) for number, (facts, lines) in enumerate(zip(checked.files, figures, strict=True))]
    page = rendered(HERE / "check.html.j2", verdict=verdict, warnings=checked.warnings, files=files, shared=checked.shared)
    with replacing(path) as file:
        file.write(page)


def _file(number: int, facts: Facts, figures: list[tuple[str, str]]) -> dict:
    return {
        "source": facts.source, "kind": facts.kind, "figures": figures, "chart": _chart(number, facts), "unit": facts.ruler.unit,
        "words": facts.words, "rows": [shown_row(row, facts) for row in facts.shown], "templated": facts.ruler.encoder is not None,
    }


def _chart(number: int, facts: Facts) -> Markup | None:
    if not facts.lengths:
        return None
    labels = {role: role for role in facts.lengths}
    title = f"Lengths in {facts.ruler.unit}, one row for each part"
    return Markup(charts.histograms(f"lengths-{number}", title, facts.lengths, labels, SLOTS))


def shown_row(row: dict, facts: Facts) -> dict:
    """A row as the model will see it: its place, the turns of the prompt, and each answer with what will become of it.

    A turn has a ``role`` ("" where the template spells it out) and ``pieces`` of (text, True for a marker of the template); ``text`` joins them.
    An answer has a ``label``, a ``note``, pieces and text alike, and a ``class``: good (trained on), bad (trained against), "" (left out).
    """
    encoder, limits, ruler = facts.ruler.encoder, facts.limits, facts.ruler
    if "text" in row:
        return {"place": row["source"], "note": "", "prompt": [], "answers": [_entry([(row["text"], False)], label="text", note="", css="good")]}
    prompt_length = ruler.prompt(row["prompt"])
    texts = answers_of(row)
    ranks, lengths = row.get("ranks", [1] * len(texts)), [ruler.completion(text) for text in texts]
    over = [length > limits.completion for length in lengths]
    long_prompt = prompt_length > limits.prompt
    unused = long_prompt or left_out(ranks, over, "ranks" in row)
    note = f"prompt: {prompt_length:,} {ruler.unit}" + (f", over the limit of {limits.prompt:,}: the row is left out" if long_prompt else "")
    if encoder is None:
        turns = [_entry([(turn["content"], False)], role=turn["role"]) for turn in row["prompt"]]
    else:
        turns = [_entry(_pieces(encoder, encoder.prompt_ids(row["prompt"])), role="")]
    answers = []
    for text, rank, length, too_long in zip(texts, ranks, lengths, over, strict=True):
        best = rank == min(ranks)
        label = ("chosen" if best else "rejected") if "ranks" in row else "completion"
        label += f", rank {rank}" if len(texts) > 2 else ""
        left = f", over the limit of {limits.completion:,}: left out" if too_long else ""
        pieces = [(text, False)] if encoder is None else _pieces(encoder, encoder.completion_ids(text))
        css = "" if too_long or unused else "good" if best else "bad"
        answers.append(_entry(pieces, label=label, note=f"{length:,} {ruler.unit}{left}", css=css))
    return {"place": row["source"], "note": note, "prompt": turns, "answers": answers}


def _entry(pieces: list[tuple[str, bool]], css: str = "", **names: str) -> dict:
    return {"pieces": pieces, "text": "".join(text for text, _ in pieces), "class": css, **names}


def _pieces(encoder: Encoder, ids: list[int]) -> list[tuple[str, bool]]:
    """The text of ids in runs of markers (special tokens) and of everything else; a run is decoded together, for a character may be several ids."""
    special = set(encoder.tokenizer.all_special_ids)
    runs: list[tuple[list[int], bool]] = []
    for one in ids:
        if not runs or runs[-1][1] != (one in special):
            runs.append(([], one in special))
        runs[-1][0].append(one)
    decode = encoder.tokenizer.decode
    return [(decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False), marker) for run, marker in runs]
