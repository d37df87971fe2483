"""Which file implements which line of the canon, and which test checks it, as configs/CANON.md.

    python -m tests.canon_table        # writes configs/CANON.md anew

A code such as R4 counts as implemented where a comment or a string of rlhf/ or stages/ names it behind the word CANON (lists and ranges too:
P3-P5), and as tested by test functions named after it (test_R4_...). A `# DEPARTS:` comment that names the code goes into the table word by
word. What is missing is said in NOT_YET and PARTLY below; tests/test_canon_table.py refuses a code about which nothing is said.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "configs" / "CANON.md"

LINES = {  # our short wording; the full text with its sources is the project's canon
    "B1": "the small GPT is a GPT-2: norms first, scaled residual starts, learned positions, shared embeddings",
    "B2": "padding has a token of its own, stands on the left of prompts and the right of rows, and changes no logit",
    "B3": "prompt and completion become ids separately; the end token belongs to the completion",
    "B4": "nothing is dropped out in reward modelling and PPO",
    "B5": "SFT can also learn the prompt's tokens, at a weight",
    "R1": "the reward model grows out of SFT, its scalar head drawn at a known scale",
    "R2": "the reward is read at the end token, never at padding",
    "R3": "pairwise logistic loss with margins; what happens to ties is a setting",
    "R4": "all pairs of a prompt's K answers weigh as one, and each answer is computed once",
    "R5": "scores are normalised on SFT answers, and the two numbers are saved with the model",
    "R6": "held-out accuracy, also by margin, with calibration and the length baseline",
    "R7": "ensembles: average, pessimist, or a price on disagreement",
    "S1": "one temperature everywhere, and no truncated sampling",
    "S2": "answers stop at the end token or the limit; the unfinished get a fixed score",
    "S3": "a price on KL at every token, the score at the last one",
    "S4": "scores from our model, a foreign tokenizer's model, a function, or their weighted sum",
    "P1": "GAE with returns taken before whitening",
    "P2": "advantages whitened over the rollout of all processes; reward whitening optional",
    "P3": "clipped policy loss and clipped value loss",
    "P4": "one division per minibatch, so that microbatches and processes do not matter",
    "P5": "shuffled epochs, falling learning rate, clipped gradients, Adam's larger epsilon",
    "P6": "a value model of its own from the reward model, or a head on the policy",
    "P7": "the price of KL is fixed, or steered towards a target",
    "P8": "the simple KL estimate is paid for, the non-negative one logged too, and both start at zero",
    "P9": "language-model gradients mixed into the PPO step",
    "P10": "a moving average of the policy can be the result",
    "P11": "epochs end early when the policy has moved far enough",
    "P12": "the reference stays what it was, after resuming and with LoRA too",
    "A1": "the first ratios of every rollout are one",
    "A2": "before the first step there is no KL",
    "A3": "no completion is empty",
    "A4": "numbers that are not finite never reach the weights, and are reported",
    "E1": "all policies answer the same prompts, which no training saw",
    "E2": "another judge than the training reward, or a warning in the first line",
    "E3": "both orders, ties, an interval, and the rate at equal length",
    "E4": "proxy, gold, KL, length, endings and variety of every policy, and the curve over training",
    "E5": "rows whose result is known beforehand",
    "E6": "few-shot scores before and after alignment",
}

NOT_YET: dict[str, str] = {}
PARTLY: dict[str, str] = {
    "E5": "by default SFT is compared with itself on the same samples; a second draw and an untrained model are policies to ask for",
    "E6": "off by default (compare.shots)",
}

_CODE = re.compile(r"\b([BRSPAE])(\d+)(?:-\1?(\d+))?\b")


def codes_in(text: str) -> set[str]:
    """Codes of the canon in a text: `R4`, `P3-P5` or `P3-5`; what only looks like one is left out."""
    found = {f"{letter}{n}" for letter, first, last in _CODE.findall(text) for n in range(int(first), int(last or first) + 1)}
    return found & set(LINES)


def cited(source: str) -> set[str]:
    """Codes that comments and strings of a Python source name behind the word CANON, in the same comment or string."""
    return {code for text in _prose(source) if "CANON" in text for code in codes_in(text[text.index("CANON"):])}


def departures(source: str) -> list[str]:
    """The `# DEPARTS:` comments of a Python source, without the mark."""
    return [text.partition("DEPARTS:")[2].strip() for text in _prose(source) if text.startswith("# DEPARTS:")]


def named_tests(source: str) -> dict[str, str]:
    """Code -> the first test of a source that is named after it."""
    found: dict[str, str] = {}
    for name, listed in re.findall(r"^def (test_((?:[BRSPAE]\d+_)+)\w*)", source, re.M):
        for code in codes_in(listed.replace("_", " ")):
            found.setdefault(code, name)
    return found


def _prose(source: str) -> Iterable[str]:
    """Comments and strings; lines with nothing but a comment that follow each other are one text."""
    text, last = "", -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            goes_on = text and alone and token.start[0] == last + 1 and not token.string.startswith("# DEPARTS:")
            if text and not goes_on:
                yield text
            text, last = f"{text} {token.string.lstrip('# ')}" if goes_on else token.string, token.start[0] if alone else -1
        elif tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
            yield token.string
    if text:
        yield text


def table() -> str:
    """The text of configs/CANON.md for the tree as it is."""
    implemented, departed, tested = _collect()
    rows = ["| code | in short | implemented in | checked by | missing or different |", "|---|---|---|---|---|"]
    for code, line in LINES.items():
        tests = "<br>".join(f"`{file}`: `{name}`" for file, name in tested.get(code, []))
        notes = [f"{mark}: {reasons[code]}" for mark, reasons in (("not yet", NOT_YET), ("in part", PARTLY)) if code in reasons]
        notes += departed.get(code, [])
        rows.append(f"| {code} | {line} | {' '.join(f'`{file}`' for file in implemented.get(code, []))} | {tests} | {'<br>'.join(notes)} |")
    return HEAD + "\n".join(rows) + "\n"


HEAD = """# The canon, line by line

Made by `python -m tests.canon_table`; edit the sources, not this file. Of each test file the first test that carries the code is named:
`pytest -k _P2_` runs them all.

"""


def complaints() -> list[str]:
    """What the table may not leave open: a code about which nothing is said, or of which more is said than is true."""
    implemented, departed, tested = _collect()
    said = []
    for code in LINES:
        if code in NOT_YET and code in implemented:
            said.append(f"{code} stands in NOT_YET, but {implemented[code][0]} implements it; take it out, or move what is missing to PARTLY")
        if code not in NOT_YET and code not in implemented and code not in departed:
            said.append(f"{code}: no `CANON {code}` in rlhf/ or stages/, no `# DEPARTS:`, and no reason in NOT_YET")
        if code in implemented and code not in tested:
            said.append(f"{code}: implemented in {implemented[code][0]}, and no test is named test_{code}_...")
    said += [f"{code} is no line of the canon" for code in sorted((NOT_YET | PARTLY).keys() - LINES.keys())]
    return said


def _collect() -> tuple[dict, dict, dict]:
    """(code -> files, code -> departures with their file, code -> (test file, test)) of the tree, files in alphabetical order."""
    implemented, departed, tested = {}, {}, {}
    for path in sorted(p for folder in ("rlhf", "stages") for p in (ROOT / folder).rglob("*.py")):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for code in cited(source):
            implemented.setdefault(code, []).append(name)
        for text in departures(source):
            for code in codes_in(text):
                departed.setdefault(code, []).append(f"`{name}` departs: {text}")
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for code, test in named_tests(path.read_text(encoding="utf-8")).items():
            tested.setdefault(code, []).append((path.relative_to(ROOT).as_posix(), test))
    return implemented, departed, tested


def main() -> int:
    open_ends = complaints()
    TABLE.write_text(table(), encoding="utf-8")
    print("\n".join([*open_ends, f"{TABLE.relative_to(ROOT)}: {len(LINES)} lines, {len(NOT_YET)} not yet"]))
    return 1 if open_ends else 0


if __name__ == "__main__":
    sys.exit(main())
