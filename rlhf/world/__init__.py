"""The embedded world: requests to an assistant, writers of mixed skill, noisy raters, and a gold score that is computed.

Its tables stand in ``data/world/``. Read ``family`` (what families share), then ``numbers``, ``lookups`` and ``manners`` (the families),
``gold`` (the rubric), ``prompts`` (sampling and splits), ``writers`` and ``raters``.
"""

from rlhf.world.family import Answer, Family
from rlhf.world.gold import gold_parts, gold_score
from rlhf.world.prompts import FAMILIES, count_prompts, family_of, parse, sample_prompts, split_of
from rlhf.world.raters import agreement, calibrate_beta, expected_agreement, rank
from rlhf.world.writers import solved_examples, write_demonstration, write_flawed, write_text

__all__ = [
    "FAMILIES", "Answer", "Family", "agreement", "calibrate_beta", "count_prompts", "expected_agreement", "family_of", "gold_parts",
    "gold_score", "parse", "rank", "sample_prompts", "solved_examples", "split_of", "write_demonstration", "write_flawed", "write_text",
]  # fmt: skip
