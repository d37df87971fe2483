"""What one file of people's data holds, measured row by row, and what of it deserves a warning. `rlhf/data/check.py` shows it.

Of a row only numbers are kept (lengths, hashes, its place), the texts of the few that are shown, and those of the answers that the bag of
words is fitted on. What costs time or memory is measured on the first rows alone; the report says on how many.
"""

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from rlhf.config import Data
from rlhf.data import duplicates
from rlhf.data.converting import REMEDIES, Report
from rlhf.data.examples import TIED
from rlhf.data.shortcuts import Accuracy, BagOfWords, Pair, bag_of_words, longer_wins
from rlhf.data.splits import split_of
from rlhf.data.wording import script_of, words_of
from rlhf.encoding import Encoder

MEASURED_ROWS = 50_000  # lengths, scripts and near-duplicates: 20 seconds of one core with short rows, counted in words
MEASURED_PAIRS = 10_000  # the texts of their answers are kept for the bag of words
SHOWN_ROWS = 8
NAMED_PLACES = 3

# From where on a figure is worth a warning. Shares of rows unless said otherwise.
MANY_DROPPED, MANY_REPEATED, MANY_SIMILAR, MANY_TIED, MANY_TOO_LONG = 0.05, 0.01, 0.05, 0.1, 0.05
MANY_DAMAGED = 0.001  # rows with marks of a wrong encoding, or with an answer that speaks for others; a stray one may be meant
FEW_ROWS, FEW_PROMPTS = 100, 50
LENGTH_SHORTCUT = 0.7  # lower end of the interval; people's preferences lie near 0.6 (HH) and reach 0.7 where models judged
WORD_SHORTCUT = 0.8  # lower end of the interval; 0.60 to 0.65 is usual for people's preferences
UNREADABLE = ("malformed JSON", "malformed CSV", "not UTF-8", "not an object", "not one row", "a key twice",
              "cells and columns differ in number", "line too long")
JUDGEMENT = re.compile("(?i)label|rating|score|rank|vote|winner|prefer|verdict|feedback|thumb|liked|quality|chosen|reject|better|worse|good|bad")
SPEAKS_FOR_OTHERS = re.compile(r"\n\n(?:Human|User|System): |<\|(?:im_start|im_end|user|assistant|system|end|endoftext|eot_id)\|>|</s>|\[/?INST\]")
WRONG_ENCODING = re.compile("\ufffd|\u00e2\u20ac[\u2122\u0153\u201c\u201d\u00a6]|\u00c3[\u0080-\u00bf]")  # lost characters, UTF-8 read as cp1252

Message = dict[str, str]


@dataclass(frozen=True)
class Finding:
    """Something that the user should know before training, and what to do about it. ``source``: the file, or several joined by "and"."""

    source: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Ruler:
    """Lengths in tokens of an encoder (a prompt with its template, a completion with its end token, as every stage counts them) or in words."""

    encoder: Encoder | None = None
    name: str = ""

    @property
    def unit(self) -> str:
        return "words" if self.encoder is None else "tokens"

    def prompt(self, messages: list[Message]) -> int:
        return sum(len(words_of(m["content"])) for m in messages) if self.encoder is None else len(self.encoder.prompt_ids(messages))

    def completion(self, text: str) -> int:
        return len(words_of(text)) if self.encoder is None else len(self.encoder.completion_ids(text))


@dataclass(frozen=True)
class Limits:
    """The longest prompt and completion that a run trains on, in tokens."""

    prompt: int = Data.max_prompt_tokens
    completion: int = Data.max_completion_tokens


class Facts:
    """The figures of one file; `take` every canonical row of `report`, then `finish`."""

    def __init__(self, source: str, report: Report, ruler: Ruler, limits: Limits):
        self.source, self.kind, self.report, self.ruler, self.limits = source, report.kind, report, ruler, limits
        self.stopped_early = False  # at --rows
        self.rows = self.measured = self.pairs = self.tied_pairs = 0
        self.lengths: dict[str, array] = {}  # by role: prompt, chosen, rejected, completion or text
        self.too_long = Counter()  # prompt, completion, row (which either may cost), answer (of a ranking that keeps others)
        self.scripts, self.other_script = Counter(), 0
        self.sides = Counter()  # train, eval, test by the split of `prepare`
        self.speaks_for_others = self.wrong_encoding = 0
        self.below_zero = 0  # margins
        self.first_places: dict[str, str] = {}
        self.prompts = array("Q")
        self.longer: Accuracy | None = None
        self.words: BagOfWords | None = None
        self.repeated: list[tuple[str, str]] = []
        self.similar: list[tuple[str, str]] = []
        self.opposed: list[tuple[str, str]] = []
        self.counts: dict[str, int] = {}
        self.judged_again, self.agreement = 0, float("nan")
        self._keys, self._lines, self._parts, self._part_of = array("Q"), array("Q"), {}, array("I")
        self._verdicts, self._verdict_rows = array("Q"), array("Q")
        self._signatures = duplicates.Signatures()
        self._pairs: list[Pair] = []
        self._pair_lengths: tuple[array, array] = (array("L"), array("L"))
        self._shown: list[tuple[int, int, dict]] = []

    @property
    def read(self) -> int:
        """Rows of the source that were looked at; the reader itself is one ahead where it was stopped."""
        return self.report.read - self.stopped_early

    # One row ----------------------------------------------------------------------------------------------------------------------------

    def take(self, row: dict) -> None:
        """Measures one canonical row."""
        prompt, answers = row.get("prompt", []), answers_of(row)
        texts = [*(m["content"] for m in prompt), *answers] if prompt else [row["text"]]
        key = duplicates.row_key(texts)
        self._keys.append(key)
        self._remember_place(row["source"])
        if prompt:
            self.prompts.append(int(row["id"], 16))
            self.sides[split_of(row["id"], Data.eval_fraction, Data.test_fraction)] += 1
        if "ranks" in row:
            self._take_verdicts(row)
        if row.get("margin", 0) < 0:
            self.below_zero += 1
            self.first_places.setdefault("below_zero", self.place(self.rows))
        self._look_for_damage(row, answers or texts)
        if self.rows < MEASURED_ROWS:
            self._measure(row, prompt, answers, texts)
        self._maybe_show(key, row)
        self.rows += 1

    def _remember_place(self, place: str) -> None:
        part, _, line = place.rpartition(":")
        self._part_of.append(self._parts.setdefault(part, len(self._parts)))
        self._lines.append(int(line))

    def place(self, row: int) -> str:
        """Where a row stands, by its number."""
        return self.report.place(list(self._parts)[self._part_of[row]], self._lines[row])

    def _take_verdicts(self, row: dict) -> None:
        prompt, answers, ranks = [m["content"] for m in row["prompt"]], row["completions"], row["ranks"]
        for i in range(len(answers)):
            for j in range(len(answers)):
                self.tied_pairs += i < j and ranks[i] == ranks[j]
                if ranks[i] < ranks[j]:
                    self.pairs += 1
                    key = duplicates.verdict_key(prompt, answers[i], answers[j])
                    if key is not None:
                        self._verdicts.append(key)
                        self._verdict_rows.append(self.rows)
                    if len(self._pairs) < MEASURED_PAIRS:
                        self._pairs.append(Pair(row["id"], answers[i], answers[j]))

    def _look_for_damage(self, row: dict, texts: list[str]) -> None:
        """Answers that go on to speak for others, and characters that a wrong encoding left."""
        for name, pattern, where in (("speaks_for_others", SPEAKS_FOR_OTHERS, answers_of(row)), ("wrong_encoding", WRONG_ENCODING, texts)):
            if any(pattern.search(text) for text in where):
                setattr(self, name, getattr(self, name) + 1)
                self.first_places.setdefault(name, self.place(self.rows))

    def _measure(self, row: dict, prompt: list[Message], answers: list[str], texts: list[str]) -> None:
        self.measured += 1
        self._signatures.add([word for text in texts for word in words_of(text)])
        last = prompt[-1]["content"] if prompt else row["text"]
        script, answered = script_of(last), script_of(best_of(row)) if answers else None
        self.scripts[script] += 1
        self.other_script += answered is not None and "no letters" not in (script, answered) and script != answered
        if not prompt:
            self._length("text", self.ruler.completion(row["text"]))
            return
        prompt_length, lengths = self.ruler.prompt(prompt), [self.ruler.completion(text) for text in answers]
        self._length("prompt", prompt_length)
        ranks = row.get("ranks", [1] * len(answers))
        for length, rank in zip(lengths, ranks, strict=True):
            self._length("completion" if "ranks" not in row else "chosen" if rank == min(ranks) else "rejected", length)
        for better, length in zip(ranks, lengths, strict=True):
            for worse, other in zip(ranks, lengths, strict=True):
                if better < worse and len(self._pair_lengths[0]) < MEASURED_PAIRS:
                    self._pair_lengths[0].append(length)
                    self._pair_lengths[1].append(other)
        over = [length > self.limits.completion for length in lengths]
        self.too_long["prompt"] += prompt_length > self.limits.prompt
        self.too_long["completion"] += any(over)
        lost = prompt_length > self.limits.prompt or left_out(ranks, over, "ranks" in row)
        self.too_long["row"] += lost
        if not lost and any(over):
            self.too_long["answer"] += sum(over)

    def _length(self, role: str, length: int) -> None:
        self.lengths.setdefault(role, array("L")).append(length)

    def _maybe_show(self, key: int, row: dict) -> None:
        """The rows with the smallest hashes are shown: any row is as likely as another, and the same file shows the same ones."""
        entry = (-key, -self.rows, row)
        if len(self._shown) < SHOWN_ROWS:
            heapq.heappush(self._shown, entry)
        elif entry > self._shown[0]:
            heapq.heapreplace(self._shown, entry)

    @property
    def shown(self) -> list[dict]:
        """The rows to show, the smallest hash first."""
        return [row for _, _, row in sorted(self._shown, reverse=True)]

    # All rows ---------------------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Compares rows with each other and fits the bag of words; the texts kept for it are let go."""
        again = duplicates.repeated(self._keys)
        self.repeated = [(self.place(row), self.place(duplicates.earlier(self._keys, row))) for row in again[:NAMED_PLACES]]
        near = duplicates.near_duplicates(self._signatures.table())
        for row in again:
            near.pop(int(row), None)
        self.similar = [(self.place(row), self.place(near[row])) for row in sorted(near)[:NAMED_PLACES]]
        both, self.judged_again, self.agreement = duplicates.contradictions(self._verdicts) if len(self._verdicts) else ([], 0, float("nan"))
        rows = self._verdict_rows
        self.opposed = [(self.place(rows[b]), self.place(rows[a])) for a, b in both[:NAMED_PLACES]]
        self.counts = {"repeated": len(again), "similar": len(near), "opposed": len(both), "prompts": len(np.unique(self.prompts))}
        if self._pairs:
            better, worse = self._pair_lengths
            self.longer = longer_wins(better, worse, [pair.prompt for pair in self._pairs][: len(better)])
            self.words = bag_of_words(self._pairs)
        self._pairs = []


def answers_of(row: dict) -> list[str]:
    """The completions of a canonical row of any kind, none for prompts and text."""
    return row["completions"] if "completions" in row else [row["completion"]] if "completion" in row else []


def best_of(row: dict) -> str:
    """The completion that SFT would imitate: the first of the best."""
    return answers_of(row)[row["ranks"].index(min(row["ranks"])) if "ranks" in row else 0]


def left_out(ranks: Sequence[int], over: Sequence[bool], ranked: bool) -> bool:
    """True when a row with answers of these ranks, some over the limit, is not trained on.

    The stages' own rules: too long a completion costs a demonstration; of a ranking it costs that answer, and the row once no pair is left
    (`rlhf.rankings.encode_rankings`).
    """
    if not ranked:
        return any(over)
    return len({rank for rank, long in zip(ranks, over, strict=True) if not long}) < 2


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Median, the length that 95 % of the rows do not exceed, and the longest."""
    values = np.sort(np.asarray(lengths))
    return tuple(int(values[int(np.ceil(share * len(values))) - 1]) for share in (0.5, 0.95, 1.0))


# What deserves a warning ------------------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """Prompts that two of the files have in common, by the id that splits go by: how many prompts, and the rows of each file that ask them."""

    first: str
    second: str
    prompts: int
    rows: tuple[int, int]


def shared_prompts(files: Sequence[Facts]) -> list[Shared]:
    """Every two files that ask the same prompt."""
    found = []
    for place, one in enumerate(files):
        for other in files[place + 1 :]:
            a, b = np.asarray(one.prompts, dtype=np.uint64), np.asarray(other.prompts, dtype=np.uint64)
            both = np.intersect1d(a, b)
            if len(both):
                found.append(Shared(one.source, other.source, len(both), (int(np.isin(a, both).sum()), int(np.isin(b, both).sum()))))
    return found


def warnings_of(facts: Facts) -> list[Finding]:
    """Everything about one file that deserves a warning."""
    checks = (_of_rows, _of_columns, _of_text, _of_repetition, _of_length, _of_verdicts, _of_shortcuts)
    return [Finding(facts.source, text, remedy) for text, remedy in chain.from_iterable(check(facts) for check in checks)]


def sharing_warnings(shared: Sequence[Shared]) -> list[Finding]:
    """A warning for every two files that share prompts."""
    return [Finding(f"{one.first} and {one.second}", f"{one.prompts:,} prompts stand in both files ({one.rows[0]:,} and {one.rows[1]:,} rows)",
                    "if one of them is for testing, take these rows out of the other; or give both files to one run: its split goes by prompt, "
                    "so that a prompt is on one side only") for one in shared]


Warned = Iterable[tuple[str, str]]  # what is wrong, what to do about it


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def percent(count: int, total: int) -> str:
    return f"{100 * _share(count, total):.1f} %"


def _of_rows(facts: Facts) -> Warned:
    drops = {reason: count for reason, count in facts.report.drops().items() if reason != TIED}  # ties are a choice, warned of by themselves
    dropped = sum(drops.values())
    damaged = [reason for reason in drops if reason in UNREADABLE]
    if damaged or _share(dropped, facts.read) >= MANY_DROPPED:
        remedies = "".join(f"{REMEDIES[reason]}; " for reason in drops if reason in REMEDIES)
        yield (f"{dropped:,} of {facts.read:,} rows ({percent(dropped, facts.read)}) cannot be used: {drop_reasons(facts.report, drops)}",
               f"{remedies}correct these lines; or go on without them: `rlhf prepare` leaves them out and lists every one in data/drops.json")
    if facts.rows < FEW_ROWS and not facts.stopped_early and facts.kind != "text":
        yield (f"{facts.rows:,} usable rows are few to train on, and the figures here are rough",
               f"gather more; from some {FEW_ROWS:,} rows on the figures say something, for training thousands are usual")
    elif facts.kind != "text" and facts.counts["prompts"] < FEW_PROMPTS and not facts.stopped_early:
        yield (f"{facts.rows:,} rows ask only {facts.counts['prompts']:,} different prompts",
               "gather answers to more prompts: those kept for the test are too few to say how a model does on others")


def _of_columns(facts: Facts) -> Warned:
    """Columns that look like a judgement of answers, or like answers, in a file that is read as demonstrations or as prompts."""
    if facts.kind not in ("demonstrations", "prompts"):
        return
    suspects = [f"`{name}`" for name, is_text in facts.report.unread.items() if JUDGEMENT.search(name) or is_text and facts.kind == "prompts"]
    if suspects:
        use = "every answer counts as one to imitate" if facts.kind == "demonstrations" else f"the {facts.kind} alone are used"
        yield (f"{', '.join(suspects)} {'is' if len(suspects) == 1 else 'are'} not read: {use}",
               "if this says which answers are better, give the answers to a prompt in one row, with scores or ranks (data/README.md), or name "
               "the columns: --mapping chosen=NAME --mapping rejected=NAME; else leave bad rows out yourself, or go on")


def drop_reasons(report: Report, drops: dict[str, int] | None = None) -> str:
    """Every reason, or those of ``drops``, with its count and the first place."""
    parts = []
    for reason, count in (report.drops() if drops is None else drops).items():
        part, lines = next(iter(report.dropped[reason].items()))
        found = f": {report.found[reason]}" if reason in report.found else ""
        parts.append(f"{reason} {count:,} (first: {report.place(part, lines[0])}{found})")
    return ", ".join(parts)


def _of_text(facts: Facts) -> Warned:
    if _share(facts.wrong_encoding, facts.rows) >= MANY_DAMAGED:
        yield (f"{facts.wrong_encoding:,} rows hold characters that a wrong encoding leaves (first: {facts.first_places['wrong_encoding']})",
               "make the file again from its source, reading and writing UTF-8")
    if _share(facts.speaks_for_others, facts.rows) >= MANY_DAMAGED:
        yield (f"{facts.speaks_for_others:,} rows have an answer with markers of a turn or of an end in it, such as `Human:` or `</s>` "
               f"(first: {facts.first_places['speaks_for_others']})",
               "cut these answers where the marker begins, or leave the rows out: a model learns to go on speaking for the user")


def _of_repetition(facts: Facts) -> Warned:
    if _share(facts.counts["repeated"], facts.rows) >= MANY_REPEATED:
        yield (f"{facts.counts['repeated']:,} rows ({percent(facts.counts['repeated'], facts.rows)}) repeat an earlier one but for case and spacing: "
               f"{pairs_named(facts.repeated)}", "keep one of each: repeated rows count several times in training")
    if _share(facts.counts["similar"], facts.measured) >= MANY_SIMILAR:
        yield (f"{facts.counts['similar']:,} rows ({percent(facts.counts['similar'], facts.measured)}) are nearly the same as an earlier one: "
               f"{pairs_named(facts.similar)}",
               "look at a few; where they are copies, keep one. Copies that fall on both sides of a split make results look better than they are")


def pairs_named(places: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{one} like {other}" for one, other in places)


def _of_length(facts: Facts) -> Warned:
    if _share(facts.too_long["row"], facts.measured) >= MANY_TOO_LONG:
        rough = "" if facts.ruler.encoder else ", even counted in words, of which most have more than one token,"
        wanted = [f"data.max_prompt_tokens={_enough(facts, ['prompt'], facts.limits.prompt)}"]
        if facts.kind != "prompts":
            wanted.append(f"data.max_completion_tokens={_enough(facts, ['chosen', 'rejected', 'completion'], facts.limits.completion)}")
        yield (f"{facts.too_long['row']:,} rows ({percent(facts.too_long['row'], facts.measured)}) are longer{rough} than a prompt of "
               f"{facts.limits.prompt:,} and a completion of {facts.limits.completion:,} tokens: stages leave them out",
               f"raise the limits, as far as the model's context reaches: {' '.join(wanted)} keep 95 % of the prompts and of the answers"
               + ("" if facts.ruler.encoder else ", counted in words; name a --tokenizer to know"))


def _enough(facts: Facts, roles: Sequence[str], limit: int) -> int:
    """A limit, as a multiple of 8, that 95 % of the lengths in each role keep; no less than the present one."""
    reach = max((quantiles(facts.lengths[role])[1] for role in roles if role in facts.lengths), default=0)
    return max(limit, -(-reach // 8) * 8)


def _of_verdicts(facts: Facts) -> Warned:
    if facts.kind != "preferences":
        return
    if facts.counts["opposed"]:
        yield (f"{facts.counts['opposed']:,} pairs of answers to one prompt are ordered both ways: {contradictions_named(facts)}",
               "where several people judged, give their votes in one row (they count by majority); otherwise drop both rows")
    if facts.below_zero:
        yield (f"{facts.below_zero:,} rows have a margin below 0 (first: {facts.first_places['below_zero']}): the reward model may then score the "
               "rejected answer higher by as much", "if the margin is a difference of scores, chosen and rejected are swapped in these rows; else "
               "leave it out there")
    tied = facts.report.drops().get(TIED, 0)
    if _share(tied, facts.rows + tied) >= MANY_TIED:
        yield (f"{tied:,} rows ({percent(tied, facts.rows + tied)}) are ties and are dropped",
               "set reward.ties=half: the reward model then learns that both answers are equally good")


def contradictions_named(facts: Facts) -> str:
    return ", ".join(f"{one} against {other}" for one, other in facts.opposed)


def _of_shortcuts(facts: Facts) -> Warned:
    if facts.longer and facts.longer.low > LENGTH_SHORTCUT:
        yield (f"the longer answer is the better one in {facts.longer.value:.0%} of the pairs: a reward model can learn length in place of quality",
               "drop pairs until both are as often longer, or watch length and the length-controlled win rate in compare's report")
    if facts.longer and facts.longer.high < 1 - LENGTH_SHORTCUT:
        yield (f"the shorter answer is the better one in {1 - facts.longer.value:.0%} of the pairs: a reward model can learn brevity, not quality",
               "check that chosen and rejected are not swapped; then drop pairs until both are as often shorter, or use the file for evaluation")
    if facts.words and facts.words.accuracy.low > WORD_SHORTCUT:
        told = [f"{side}: {' '.join(f'`{word}`' for word in words[:5])}"
                for side, words in (("for it speak", facts.words.good), ("against it", facts.words.bad)) if words]
        yield (f"single words give the better answer away in {facts.words.accuracy.value:.0%} of the pairs on prompts not learned from; "
               f"{'; '.join(told)}",
               "look for what marks one side (a model's set phrase, a missing end, a format) and take it out of both")


@dataclass
class Checked:
    """All files that were looked at, what they share, and every warning."""

    files: list[Facts]
    shared: list[Shared] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
