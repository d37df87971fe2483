"""Where the files that ship with the project lie: beside the package in a checkout, inside it after a plain install."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(relative: str) -> Path:
    """Path of a shipped file such as ``configs/quickstart.yaml`` or ``data/world/facts.json``; FileNotFoundError if it is not there."""
    for root in (PACKAGE / "_shipped", PACKAGE.parent):  # in site-packages the parent may hold another project's `configs`
        path = root / relative
        if path.exists():
            return path
    raise FileNotFoundError(f"{relative} does not ship with this installation of rlhf ({PACKAGE})")


def from_home(path: str) -> str:
    """`path` with the user's home folder for a leading ~, which shells leave as it is behind `section.key=`."""
    return os.path.expanduser(path)
