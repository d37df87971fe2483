"""Words and writing systems of text in any language, without a dictionary: enough to count, compare and tell apart, no more."""

import re
from collections import Counter

from rlhf.data.splits import normalise

# Written without spaces: every character is counted as a word of its own.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_WORD_OR_MARK = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
SCRIPTS = {  # ranges of letters; what no range holds is "other"
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff\ua720-\ua7ff\uff21-\uff3a\uff41-\uff5a",
    "Han": "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Kana": "\u3040-\u3096\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "Hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "Hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "Devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "Thai": "\u0e00-\u0e7f",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in SCRIPTS.items()}
MIXED_KANA = 0.05  # Japanese is mostly Han with kana between; Chinese has none


def words_of(text: str) -> list[str]:
    """The words of a text, its case and spelling forms folded (`normalise`); a character each where a script has no spaces."""
    return _WORD.findall(_spaced(text))


def words_and_marks(text: str) -> list[str]:
    """As `words_of`, and every punctuation mark as a word too."""
    return _WORD_OR_MARK.findall(_spaced(text))


def _spaced(text: str) -> str:
    folded = normalise(text)
    return folded if folded.isascii() else _UNSPACED.sub(r" \g<0> ", folded)


def script_of(text: str) -> str:
    """The writing system that most letters of a text belong to: a name of `SCRIPTS`, Japanese, other, or "no letters".

    It is no language: Latin may be any of hundreds. Japanese is guessed where at least one letter in twenty is kana.
    """
    letters = sum(map(str.isalpha, text))
    if letters == 0:
        return "no letters"
    if text.isascii():
        return "Latin"
    counts = Counter({name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()})
    counts["other"] = letters - sum(counts.values())
    if counts["Kana"] >= MIXED_KANA * letters and counts["Kana"] + counts["Han"] >= max(counts.values()):
        return "Japanese"
    return max(counts, key=counts.__getitem__)
