"""`python -m rlhf NAME` is the same as `rlhf NAME`."""

import sys

from rlhf.cli import main

sys.exit(main())
