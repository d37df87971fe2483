"""What the libraries say that would only worry people."""

import logging
import re
import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """No bars for loading and writing, and no messages about what is done here on purpose; everything else is still said."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # peft sets it right itself
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # said to trl, not to us
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)  # older torch lacks the new name
    logger = logging.getLogger("transformers.modeling_utils")
    if not any(isinstance(f, _OnPurpose) for f in logger.filters):
        logger.addFilter(_OnPurpose())
        logging.getLogger("accelerate.utils.other").addFilter(_OnPurpose())


class _OnPurpose(logging.Filter):
    """Drops load reports in which nothing but heads is missing or left over (a causal LM became a reward model), the advice to pass an
    attention mask (right padding needs none in a causal model), and the note that tied weights are stored once."""

    LINE = re.compile(r"^(\S+)\s*\|\W*(?:\x1b\[\d+m)?(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", re.MULTILINE)
    HEADS = ("score.", "classifier.", "lm_head.", "cls.", "pooler.", "bert.pooler.")

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return "We strongly recommend passing in an `attention_mask`" not in message and "Removed shared tensor" not in message
        lines = self.LINE.findall(message)
        return not lines or not all(key.startswith(self.HEADS) and status in ("MISSING", "UNEXPECTED") for key, status in lines)
