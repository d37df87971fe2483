"""The stages, one runnable module each."""

import rlhf  # noqa: F401 - before any stage imports torch: it decides how OpenMP's threads wait (`python -m stages.NAME` comes here first)
