"""The ChatGPT recipe as three chained stages on one small GPT: SFT, a reward model, and PPO against it."""

import os

# Before torch is first imported, or it has no effect. OpenMP threads that wait by spinning stop each other where cores are shared with anything
# else; those that sleep at once lose a third of a large model's time on an idle machine. A thousand turns and then sleep is as fast as spinning
# there, and beside other work loses little of what sleep gains for small models (configs/EXPERIMENTS.md, "Speed on two cores").
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
