"""People's own files: recognised, converted to canonical rows, split by prompt. `data/README.md` shows every schema."""

from rlhf.data.converting import Converted, Report, convert
from rlhf.data.formats import FORMATS, KINDS, Format, recognise
from rlhf.data.reading import Drop, read_rows
from rlhf.data.splits import SPLITS, prompt_id, split_of, text_id

__all__ = [
    "FORMATS",
    "KINDS",
    "SPLITS",
    "Converted",
    "Drop",
    "Format",
    "Report",
    "convert",
    "prompt_id",
    "read_rows",
    "recognise",
    "split_of",
    "text_id",
]
