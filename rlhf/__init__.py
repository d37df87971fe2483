"""The ChatGPT recipe as three chained stages on one small GPT: SFT, a reward model, and PPO against it."""

__version__ = "0.1.0"
