"""Text of models and data in a terminal: nothing in it is obeyed, and lines are as wide as they look."""

import argparse
import re
import textwrap
import unicodedata

CONTROL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC and other strings: window title, clipboard, links
    r"|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # all else but newline and tab
    r"|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # direction overrides, which show text in another order than it has


class Help(argparse.HelpFormatter):
    """A docstring as --help shows it: sentences are filled to the terminal's width, commands (four spaces in front) stay as they are, and what
    stands behind a setting (two spaces in front) stays in its column."""

    def _fill_text(self, text, width, indent):
        lines = re.sub(r"(?<=[^\s.])\n(?=\S)", " ", text).split("\n")
        return "\n".join(line if line.startswith("    ") else textwrap.fill(
            line, width, subsequent_indent=" " * len(re.match(r"(?:  \S+ +)?", line)[0]), break_on_hyphens=False) for line in lines)


def whole_number(text: str) -> int:
    """The type of an option that is a whole number from 1 up, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number from 1 up")
    return int(text)


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey: control sequences go, newlines and tabs stay."""
    return CONTROL.sub("", text.replace("\r\n", "\n"))


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, broken at spaces, or anywhere in what has none (a long word, Chinese)."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if not line or cells(line) + 1 + cells(word) <= width:
                line = f"{line} {word}" if line else word
            else:
                lines.append(line)
                line = word
            while cells(line) > width:
                fits = next(n for n in range(len(line), 0, -1) if cells(line[:n]) <= width or n == 1)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def cells(text: str) -> int:
    """Columns that `text` takes in a terminal: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
