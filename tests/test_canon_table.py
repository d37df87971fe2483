"""configs/CANON.md tells the truth: it is the table of this tree, and no line of the canon is passed over in silence."""

import pytest

from tests.canon_table import LINES, NOT_YET, TABLE, cited, codes_in, complaints, departures, named_tests, table

SHARE = {"B": 5, "R": 7, "S": 4, "P": 12, "A": 4, "E": 6}


def test_the_table_is_that_of_this_tree():
    assert TABLE.read_text(encoding="utf-8") == table(), "out of date: run `python -m tests.canon_table`"


def test_nothing_is_passed_over_in_silence():
    assert complaints() == []


def test_every_line_of_the_canon_has_a_row_and_what_is_missing_a_reason():
    assert list(LINES) == [f"{letter}{n}" for letter, count in SHARE.items() for n in range(1, count + 1)]
    assert all(len(reason.split()) > 5 for reason in NOT_YET.values())


@pytest.mark.parametrize(("text", "codes"), [
    ("CANON R4", {"R4"}), ("P3-P5, A1", {"P3", "P4", "P5", "A1"}), ("(E1-3)", {"E1", "E2", "E3"}), ("R8 P13 B0 S44", set()), ("GPT2 AR4 R4x", set()),
    ("N+ 12-14, P12", {"P12"}),
])
def test_codes_by_hand(text, codes):
    assert codes_in(text) == codes


def test_what_counts_as_a_citation():
    source = '"""Scores (CANON S4) and norms (R5)."""\n\nR7 = 1  # plain R6\nx = f"{R7} (CANON A3)"\n# A comment about CANON\n# P1 over two lines\n'
    assert cited(source) == {"S4", "R5", "A3", "P1"}
    assert cited("# (R1) before the word CANON\n") == set()


def test_what_counts_as_a_departure():
    source = "# why\n# DEPARTS: P7 has another price,\n# it was dear (there)\nx = 1  # DEPARTS: R3 too\n# of y\ny = 'DEPARTS: R4'  # and no more\n"
    assert departures(source) == ["P7 has another price, it was dear (there)", "R3 too"]


def test_a_test_counts_for_every_code_of_its_name_and_the_first_one_is_shown():
    source = "def test_R4_a():\n    pass\n\n\ndef test_R3_R4_b():\n    pass\n\n\ndef test_other_R5():\n    pass\n"
    assert named_tests(source) == {"R4": "test_R4_a", "R3": "test_R3_R4_b"}
