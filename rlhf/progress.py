"""What a person sees while a stage runs: a bar with the figures that matter in a terminal, plain lines elsewhere, little with --quiet."""

import os
import sys
import time

from rlhf.runs import is_main
from rlhf.terminal import printable

QUIET = "RLHF_QUIET"
CELLS = 20  # of the bar, where the line leaves so much room
SHOWN_AS = {"tokens_per_second": "tokens/s"}


def say(message: str) -> None:
    """One line from the main process; names and text of data in it are shown, not obeyed."""
    if is_main():
        print(printable(message), flush=True)


def counted(number: int, thing: str) -> str:
    """How many there are of a thing: 1 step, 1,234 minibatches."""
    return f"{number:,} {thing}" + ("" if number == 1 else "es" if thing.endswith("ch") else "s")


class Progress:
    """`with Progress("ppo", total) as bar: bar.update(step, score=0.3)`: a bar that rewrites itself, or a line every `every` seconds."""

    def __init__(self, label: str, total: int, start: int = 0, every: float = 15.0):
        self.label, self.total, self.start, self.every = label, total, start, every
        self.live = is_main() and sys.stdout.isatty() and not os.environ.get(QUIET)

    def __enter__(self):
        self.began = time.perf_counter()
        self.shown = self.began if not self.live else 0.0
        return self

    def __exit__(self, *exception):
        if self.live:
            print(flush=True)

    def update(self, step: int, **figures) -> None:
        """`step` counts what is finished; figures are shown in the given order."""
        now = time.perf_counter()
        last = step >= self.total
        if not is_main() or (now - self.shown < (0.2 if self.live else self.every) and not last) or (os.environ.get(QUIET) and not last):
            return
        self.shown = now
        spent = now - self.began
        left = spent / max(step - self.start, 1) * (self.total - step)
        shown = [f"{SHOWN_AS.get(name, name)} {_short(value)}" for name, value in figures.items() if value is not None]
        parts = [f"{self.label} {step}/{self.total}", f"{_clock(spent)}<{_clock(left)}", *shown]
        if self.live:
            print(f"\r\033[K{_bar(parts, step / self.total, os.get_terminal_size().columns - 1)}", end="", flush=True)
        else:
            print("  ".join(parts), flush=True)


def _bar(parts: list[str], done: float, width: int) -> str:
    """A line of at most `width` columns: whole figures, of which those before the last give way, after as much of a bar as there is room for."""
    while len("  ".join(parts)) > width and len(parts) > 3:
        parts = [*parts[:-2], parts[-1]]
    line = "  ".join(parts)
    cells = min(CELLS, width - len(line) - 3)
    return f"[{'#' * int(cells * done):.<{cells}}] {line}" if cells > 0 else line[:width]


def _short(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
