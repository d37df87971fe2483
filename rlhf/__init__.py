"""The ChatGPT recipe as three chained stages on one small GPT: SFT, a reward model, and PPO against it."""

import os

# Before torch is first imported, or it has no effect. Threads of OpenMP that wait by spinning stop each other where cores are shared with
# anything else: on a busy 2-core machine a training step took 1,100-1,700 ms spinning and 104-118 ms sleeping (configs/EXPERIMENTS.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
