"""Looks at files before anything is trained on them: what they are, what cannot be used, and whether the rest is good.

    rlhf data check mine.jsonl
    rlhf data check train.jsonl test.jsonl --tokenizer runs/mine/sft/model

A summary goes to the terminal, and data-check/report.html shows the same with charts and a few rows as the model will see them. It asks
of each file: rows and what was dropped, lengths and what is too long to train on, writing systems, repetitions, pairs ordered both ways,
and how far "the longer answer wins" and a bag of words get. Of several files: which prompts they share. Agreement is that of the votes on a
row, where a schema has several, and that of rows which judge the same two answers again.

Exit codes: 0 nothing to warn of; 1 usable, with warnings that say what to do; 2 unusable, the message names the file and the remedy.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from rlhf.cli import guarded
from rlhf.config import Data
from rlhf.data.check_page import shown_row, write_page
from rlhf.data.converting import Converted, convert
from rlhf.data.examples import TIED
from rlhf.data.facts import (
    Checked,
    Facts,
    Limits,
    Ruler,
    contradictions_named,
    drop_reasons,
    pairs_named,
    percent,
    quantiles,
    shared_prompts,
    sharing_warnings,
    warnings_of,
)
from rlhf.data.formats import KINDS
from rlhf.data.shortcuts import Accuracy
from rlhf.data.splits import SPLITS
from rlhf.errors import EXIT_DONE, EXIT_WARNINGS, InputError
from rlhf.terminal import Help, printable, whole_number

RECOGNISED_IN_ORDER = ("preferences", "demonstrations", "text", "prompts")  # a document could pass for a prompt, so text goes before
SHOWN_CHARACTERS = 400  # of a part of a row, in the terminal
GREEN, RED, DIM, BOLD, YELLOW, OFF = "\033[32m", "\033[31m", "\033[2m", "\033[1m", "\033[33m", "\033[0m"


def main(argv: list[str] | None = None) -> int:
    """The command `rlhf data check`; returns the exit code."""
    arguments = parser().parse_args(argv)
    warned = False

    def check() -> None:
        nonlocal warned
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # letters that the terminal lacks are no reason to end
        try:
            warned = bool(_check(arguments).warnings)
        except BrokenPipeError:  # whoever read the summary has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    code = guarded(check)
    return EXIT_WARNINGS if code == EXIT_DONE and warned else code


def parser() -> argparse.ArgumentParser:
    """The options of `rlhf data check`."""
    tool = argparse.ArgumentParser(prog="rlhf data")
    commands = tool.add_subparsers(required=True, metavar="check", help="looks at your files before anything is trained on them: are they good?")
    options = commands.add_parser("check", description=__doc__, formatter_class=Help)
    options.add_argument("files", nargs="+", metavar="FILE", help="file, folder, pattern or hub id")
    options.add_argument("--kind", choices=KINDS, help="what the files are to be used as (default: recognised)")
    options.add_argument("--mapping", action="append", default=[], metavar="WANTED=FOUND",
                         help="a column's name, as in the setting data.mapping; may be given several times: --mapping chosen=good")
    options.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="a model's folder or hub id to count tokens with (default: words are counted)")
    options.add_argument("--max-prompt-tokens", type=whole_number, default=Data.max_prompt_tokens, metavar="N",
                         help=f"longest prompt that is trained on, tokens (default: {Data.max_prompt_tokens})")
    options.add_argument("--max-completion-tokens", type=whole_number, default=Data.max_completion_tokens, metavar="N",
                         help=f"longest completion, tokens with the end token (default: {Data.max_completion_tokens})")
    options.add_argument("--rows", type=whole_number, metavar="N", help="look at no more than the first N rows of each file (default: all)")
    options.add_argument("--show", type=int, default=2, metavar="N", help="rows of each file shown in the terminal, 0 for none (default: 2)")
    options.add_argument("--out", default="data-check", metavar="FOLDER", help="folder of report.html (default: data-check)")
    return tool


def _check(arguments) -> Checked:
    ruler, limits = _ruler(arguments.tokenizer), Limits(arguments.max_prompt_tokens, arguments.max_completion_tokens)
    mapping = _mapping(arguments.mapping)
    files = [look_at(source, arguments.kind, mapping, ruler, limits, arguments.rows) for source in arguments.files]
    shared = shared_prompts(files)
    checked = Checked(files, shared, [*(finding for facts in files for finding in warnings_of(facts)), *sharing_warnings(shared)])
    for facts in files:
        _say(*_summary(facts), *_rows(facts, arguments.show), "")
    _say(*_between_files(checked), *_verdict(checked))
    page = Path(arguments.out) / "report.html"
    try:
        write_page(page, checked, verdict(checked), [figures(facts) for facts in files])
    except OSError as error:
        raise InputError(f"--out {arguments.out}: report.html cannot be written there ({error.strerror}); name another folder") from error
    _say(f"report: {page}")
    return checked


def _ruler(tokenizer: str | None) -> Ruler:
    if tokenizer is None:
        return Ruler()
    from rlhf.models import load_encoder  # transformers takes seconds to import, and words need none of it

    try:
        return Ruler(load_encoder(tokenizer), tokenizer)
    except InputError as error:
        raise InputError(f"--tokenizer {tokenizer}: {error}; without --tokenizer lengths are counted in words") from None


def _mapping(pairs: list[str]) -> dict[str, str] | None:
    mapping = {}
    for pair in pairs:
        wanted, equals, found = pair.partition("=")
        if not (wanted and equals and found):
            raise InputError(f"--mapping {pair}: wanted WANTED=FOUND, such as chosen=good for a column `good` with the better answers")
        mapping[wanted] = found
    return mapping or None


def look_at(source: str, kind: str | None, mapping: dict[str, str] | None, ruler: Ruler, limits: Limits, most: int | None = None) -> Facts:
    """The facts of one source; ``most``: after this many rows read no more are asked for. InputError for what cannot be used at all."""
    converted = recognised(source, kind, mapping)
    facts = Facts(source, converted.report, ruler, limits)
    for row in converted.rows:
        facts.take(row)
        if most is not None and converted.report.read > most:  # the reader is one row ahead
            facts.stopped_early = True
            break
    facts.finish()
    return facts


def recognised(source: str, kind: str | None, mapping: dict[str, str] | None) -> Converted:
    """The source as the kind named, or as the first kind, from the most particular one, of which a schema fits. InputError if none does."""
    if kind is not None:
        return convert(source, kind, mapping)
    refusals = []
    for wanted in RECOGNISED_IN_ORDER:
        try:
            return convert(source, wanted, mapping)
        except InputError as error:
            refusals.append(error)
    if len({str(error) for error in refusals}) == 1:  # nothing to do with the kind: there is no such file, or no row in it
        raise refusals[0]
    raise InputError(f"{refusals[0]}.\nIt is none of {', '.join(RECOGNISED_IN_ORDER[1:])} either; "
                     "here the mapping is given as --mapping chosen=good --mapping rejected=bad")


# What is said in the terminal -------------------------------------------------------------------------------------------------------------


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def _colour(code: str, text: str) -> str:
    return f"{code}{text}{OFF}" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def figures(facts: Facts) -> list[tuple[str, str]]:
    """What is said of one file, as names and sentences for terminal and page alike; a name that is empty goes on with the one before."""
    return [*_contents(facts), *_lengths(facts), *_copies(facts), *_pairs(facts)]


def _contents(facts: Facts) -> list[tuple[str, str]]:
    report = facts.report
    dropped = sum(report.drops().values())
    forms = dict.fromkeys(f"{form.name}: {form.describe}" for form in report.formats.values())
    lines = [("schema", form) for form in forms]
    lines.append(("rows", f"{facts.read:,} read{' (stopped there, --rows)' if facts.stopped_early else ''}, {facts.rows:,} usable as {facts.kind}, "
                  f"{dropped:,} dropped{': ' + drop_reasons(report) if dropped else ''}"))
    lines += [("not read", f"columns {', '.join(report.unread)}")] if report.unread else []
    lines += [("", f"{sum(map(len, places.values())):,} single answers left out: {reason}") for reason, places in report.left_out.items()]
    if facts.prompts:
        turns = sorted(report.turns)
        sides = ", ".join(f"{facts.sides[side]:,} {side}" for side in SPLITS)
        lines.append(("turns", str(turns[0]) if len(turns) == 1 else f"{turns[0]} to {turns[-1]}"))
        lines.append(("prompts", f"{facts.counts['prompts']:,} different first questions; split by them: {sides} rows"))
    for count, first, what in ((facts.wrong_encoding, "wrong_encoding", "with characters that a wrong encoding leaves"),
                               (facts.speaks_for_others, "speaks_for_others", "with markers of a turn or of an end in an answer")):
        lines += [("damage", f"{count:,} rows {what} (first: {facts.first_places[first]})")] if count else []
    scripts = ", ".join(f"{name} {percent(count, facts.measured)}" for name, count in facts.scripts.most_common(5))
    differ = f"; {facts.other_script:,} answers in another script than their prompt" if facts.other_script else ""
    return [*lines, ("scripts", f"{scripts}{' of the prompts' if facts.prompts else ''}{differ}")]


def _lengths(facts: Facts) -> list[tuple[str, str]]:
    counted = f"tokens of {facts.ruler.name}" if facts.ruler.encoder else "words, as no --tokenizer is named"
    lines = [("lengths", f"in {counted}{_first(facts.measured, facts.rows, 'rows')}")]
    for role, lengths in facts.lengths.items():
        median, most, longest = quantiles(lengths)
        lines.append(("", f"{role}: median {median:,}, 95 % at most {most:,}, longest {longest:,}"))
    if facts.prompts:
        limits = f"{facts.limits.prompt:,} for a prompt" + (f", {facts.limits.completion:,} for a completion" if facts.kind != "prompts" else "")
        single = f" and {facts.too_long['answer']:,} single answers of others" if facts.too_long["answer"] else ""
        rows = f"{facts.too_long['row']:,} rows ({percent(facts.too_long['row'], facts.measured)})"
        lines.append(("too long", f"{rows}{single} would be left out at {limits}"
                      + ("" if facts.ruler.encoder else "; more in tokens, for a word often has several")))
    return lines


def _copies(facts: Facts) -> list[tuple[str, str]]:
    named = [f": {pairs_named(places)}" if places else "" for places in (facts.repeated, facts.similar)]
    return [("repeated", f"{facts.counts['repeated']:,} rows are the same as an earlier one{named[0]}"),
            ("", f"{facts.counts['similar']:,} nearly the same{_first(facts.measured, facts.rows, 'rows')}{named[1]}")]


def _pairs(facts: Facts) -> list[tuple[str, str]]:
    if facts.kind != "preferences":
        return []
    report, tied = facts.report, facts.report.drops().get(TIED, 0)
    lines = [("pairs", f"{facts.pairs:,} with a better and a worse answer; ties: {tied:,} whole rows, {facts.tied_pairs:,} pairs in others")]
    if report.voted:
        lines.append(("", f"{report.voted:,} rows judged by several people: two of them say the same in {report.votes_agree / report.voted:.0%} "
                      "(better, worse or tied)"))
    if facts.judged_again:
        agreement = "" if math.isnan(facts.agreement) else f", their verdicts agree in {facts.agreement:.0%}"
        opposed = f"; {facts.counts['opposed']:,} ordered both ways" + (f": {contradictions_named(facts)}" if facts.opposed else "")
        lines.append(("", f"{facts.judged_again:,} pairs of answers judged more than once{agreement}{opposed}"))
    if facts.longer:
        lines.append(("shortcuts", f"the longer answer wins: {_interval(facts.longer)}"))
        words = _interval(facts.words.accuracy) if facts.words else "too few prompts to hold some out"
        lines.append(("", f"bag of words on prompts not learned from: {words}"))
        lines.append(("", "a reward model has to beat both; 0.60 to 0.65 is usual for people's preferences, more than 0.8 points to a leak"))
    return lines


def _interval(accuracy: Accuracy) -> str:
    return f"{accuracy.value:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f}, {accuracy.pairs:,} pairs)"


def _first(measured: int, rows: int, what: str) -> str:
    return f" (the first {measured:,} {what})" if measured < rows else ""


def _summary(facts: Facts) -> list[str]:
    lines = [_colour(BOLD, printable(f"{facts.source}: {facts.kind}"))]
    return lines + [printable(f"  {name:<11}{text}") for name, text in figures(facts)]


def _rows(facts: Facts, n: int) -> list[str]:
    """A few rows, shortened: the prompt dim, what is trained on green, what is trained against red."""
    lines = []
    for row in facts.shown[: max(n, 0)]:
        shown = shown_row(row, facts)
        lines += ["", printable(f"  {shown['place']}")]
        for turn in shown["prompt"]:
            lines.append(_colour(DIM, _shortened(f"{turn['role']}: {turn['text']}" if turn["role"] else turn["text"])))
        for answer in shown["answers"]:
            lines.append(_colour({"good": GREEN, "bad": RED, "": DIM}[answer["class"]], _shortened(f"{answer['label']}: {answer['text']}")))
    return lines


def _shortened(text: str) -> str:
    text = printable(text)
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " [...]"
    return "\n".join(f"    {line}" for line in text.strip().split("\n") if line.strip())


def _between_files(checked: Checked) -> list[str]:
    if len(checked.files) < 2:
        return []
    found = [printable(f"  {one.prompts:,} prompts in both {one.first} and {one.second}") for one in checked.shared]
    return [_colour(BOLD, "between the files"), *(found or ["  no prompt is in two of them"]), ""]


def _verdict(checked: Checked) -> list[str]:
    lines = []
    for finding in checked.warnings:
        lines.append(_colour(YELLOW, printable(f"warning: {finding.source}: {finding.text}")))
        lines.append(printable(f"  remedy: {finding.remedy}"))
    return [*lines, verdict(checked)]


def verdict(checked: Checked) -> str:
    """The conclusion in one line."""
    count = len(checked.warnings)
    return "Nothing to warn of: the data can be trained on." if not count else f"Usable, with {count} warning{'s' * (count > 1)}."
