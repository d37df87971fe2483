"""Rows that say the same: exactly (a hash of the normalised texts) or nearly (MinHash of word shingles), and pairs judged both ways.

Nothing here keeps a text. An exact comparison costs 8 bytes a row, MinHash 256, whatever the rows hold.
"""

import hashlib
import zlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf.data.splits import normalise

HASHES = 64  # of a signature; its estimate of a similarity s errs by sqrt(s (1 - s) / 64), 0.05 at 0.8
BANDS = 16  # of 4 hashes; rows that agree in a band are compared: at similarity 0.8 all but one pair in 5,000 agree in one
SHINGLE = 3  # words
SIMILAR = 0.8  # Jaccard similarity from which two rows are nearly the same

_DRAWS = np.random.default_rng(20240229)  # fixed: the same file has the same near-duplicates every time
_FACTORS = _DRAWS.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _DRAWS.integers(0, 2**63, HASHES, dtype=np.uint64)


def row_key(texts: Iterable[str]) -> int:
    """64 bits that name texts in their order, whatever their case and spacing."""
    return _hash(normalise(text) for text in texts)


def _hash(parts: Iterable[str]) -> int:
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def verdict_key(prompt: Iterable[str], better: str, worse: str) -> int | None:
    """64 bits for "to this prompt, this answer beat that one": the last bit says which won, the others are the same both ways round.

    None where the two answers differ in case and spacing alone: such a verdict contradicts itself.
    """
    better, worse = normalise(better), normalise(worse)
    if better == worse:
        return None
    names = _hash([*map(normalise, prompt), *sorted((better, worse))])
    return names >> 1 << 1 | (better < worse)


def repeated(keys: Sequence[int]) -> np.ndarray:
    """Places (ascending) of the keys that stood there before."""
    keys = np.asarray(keys, dtype=np.uint64)
    first = np.unique(keys, return_index=True)[1]
    return np.setdiff1d(np.arange(len(keys)), first, assume_unique=True)


def earlier(keys: Sequence[int], place: int) -> int:
    """The first place of the key at `place`."""
    keys = np.asarray(keys, dtype=np.uint64)
    return int(np.flatnonzero(keys == keys[place])[0])


def contradictions(verdicts: Sequence[int]) -> tuple[list[tuple[int, int]], int, float]:
    """Verdicts (`verdict_key`) on the same pair of answers.

    Returns (place of a verdict, place of one that says the opposite) for each pair of answers that has both, how many pairs of answers were
    judged more than once, and the mean over these of the share of their verdicts, two by two, that agree (NaN where there are none).
    """
    verdicts = np.asarray(verdicts, dtype=np.uint64)
    names, group, sizes = np.unique(verdicts >> np.uint64(1), return_inverse=True, return_counts=True)
    first_won = np.bincount(group, weights=(verdicts & np.uint64(1)).astype(float), minlength=len(names))
    several = sizes > 1
    agreeing = (first_won * (first_won - 1) + (sizes - first_won) * (sizes - first_won - 1))[several] / (sizes * (sizes - 1))[several]
    opposed = np.flatnonzero((first_won > 0) & (first_won < sizes))
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    places = []
    for name in opposed:
        inside = order[starts[name] : starts[name + 1]]
        bits = verdicts[inside] & np.uint64(1)
        places.append((int(inside[0]), int(inside[np.flatnonzero(bits != bits[0])[0]])))
    return sorted(places), int(several.sum()), float(agreeing.mean()) if len(agreeing) else float("nan")


def signature(words: Sequence[str]) -> np.ndarray:
    """MinHash of the runs of three words: HASHES uint32, in each place the smallest value of one hash over all runs (at least one word)."""
    runs = {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
    values = np.fromiter((zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs), dtype=np.uint64, count=len(runs))
    mixed = values[:, None] * _FACTORS + _SHIFTS  # wraps around at 2**64, as multiply-shift hashing wants; its upper half is the hash
    return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)


class Signatures:
    """Signatures of rows in their order, 256 bytes each."""

    def __init__(self):
        self._values = array("I")

    def add(self, words: Sequence[str]) -> None:
        self._values.frombytes(signature(words).tobytes())

    def table(self) -> np.ndarray:
        """(rows, HASHES) uint32."""
        return np.frombuffer(self._values, dtype=np.uint32).reshape(-1, HASHES) if self._values else np.zeros((0, HASHES), np.uint32)


def near_duplicates(table: np.ndarray) -> dict[int, int]:
    """Row -> an earlier row that is estimated to share at least SIMILAR of their runs of words.

    Of rows that agree in a band each is compared with the first alone, so that the time grows with the rows and not with their square.
    """
    found: dict[int, int] = {}
    width = HASHES // BANDS
    for band in range(BANDS):
        part = np.ascontiguousarray(table[:, band * width : (band + 1) * width])
        _, first, group = np.unique(part, axis=0, return_index=True, return_inverse=True)
        before = first[group.reshape(-1)]
        rows = np.flatnonzero(before < np.arange(len(table)))
        alike = (table[rows] == table[before[rows]]).mean(axis=1) >= SIMILAR
        for row in rows[alike]:
            found.setdefault(int(row), int(before[row]))
    return found
