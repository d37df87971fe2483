"""The glossary: every figure has a unit and a sentence, and a figure without one is refused."""

import re

import pytest

from rlhf.metrics import GLOSSARY, check_names
from rlhf.paths import PACKAGE


def test_unknown_figures_are_refused_by_name():
    check_names({"loss": 1.0, "kl": 2.0})
    with pytest.raises(KeyError, match="my_figure"):
        check_names({"loss": 1.0, "my_figure": 2.0})


@pytest.mark.parametrize("name", GLOSSARY)
def test_every_line_has_a_unit_and_says_what_it_is(name):
    unit, meaning = GLOSSARY[name]
    assert isinstance(unit, str) and len(meaning) >= 8
    assert re.fullmatch(r"[a-z0-9_]+", name)


def test_every_line_is_of_a_figure_that_the_code_knows():
    code = "\n".join(path.read_text(encoding="utf-8") for folder in ("rlhf", "stages") for path in (PACKAGE.parent / folder).rglob("*.py")
                     if path.name != "metrics.py")
    prefixes = ("seconds_", "eval_")  # put together from a phase of the clock, or from the name of a training figure
    unused = [name for name in GLOSSARY if not re.search(rf"\b{name}\b", code) and not name.startswith(prefixes)]
    assert unused == []
