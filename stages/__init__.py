"""The stages, one runnable module each."""

import sys

import rlhf  # noqa: F401 - before any stage imports torch: it decides how OpenMP's threads wait (`python -m stages.NAME` comes here first)
from rlhf.cli import end_early_interrupts

if sys.argv[:1] == ["-m"]:  # Python is still looking for the stage of `python -m stages.NAME`
    end_early_interrupts()
