"""The glossary of every figure in metrics.jsonl: unit, what is normal, what going wrong looks like. Unknown names are refused."""

GLOSSARY = {
    # name: (unit, what it is and what is normal)
    "loss": ("nats", "training loss of the step; falls"),
    "eval_loss": ("nats", "the same loss on held-out data; rising while loss falls is over-fitting"),
    "lr": ("", "learning rate of the step"),
    "grad_norm": ("", "gradient norm before clipping; sudden tenfold jumps announce trouble"),
    "tokens_per_second": ("tokens/s", "real tokens (no padding) through the stage per second"),
    "seconds": ("s", "wall time of the step"),
    "accuracy": ("share", "of the training pairs the reward model orders right; noisy labels cap it near the raters' agreement"),
    "eval_accuracy": ("share", "of held-out pairs ordered right; below longer_wins_accuracy nothing was learned"),
    "reward_gap": ("raw score", "mean score difference within pairs"),
    "score_mean": ("score", "mean score of the rollout's completions, normalised: the SFT policy's is 0, standard deviation 1; rises"),
    "score_std": ("score", "their standard deviation; near 0 means that all answers became alike"),
    "gold_mean": ("0 to 1", "mean gold score of the rollout, for the report alone; falling while score_mean rises is over-optimisation"),
    "kl": ("nats per completion", "mean over completions of the summed log-ratio to the SFT policy (k1); grows slowly from 0"),
    "kl_k3": ("nats per completion", "the same by the k3 estimator, never negative"),
    "likelihood": ("nats per completion", "mean log-probability of a completion under the SFT policy; a fall means answers that SFT would not give"),
    "kl_coef": ("score per nat", "price of KL in the reward"),
    "entropy": ("nats per token", "of the policy at the sampled tokens; a fast fall to 0 is collapse"),
    "length_mean": ("tokens", "mean completion length with EOS; running away is reward hacking"),
    "eos_rate": ("share", "of completions that end by themselves; should stay near 1"),
    "distinct_2": ("share", "distinct word pairs in the rollout; a fall is collapse"),
    "policy_loss": ("", "clipped surrogate, near 0"),
    "value_loss": ("", "half squared error of the values, in score units"),
    "explained_variance": ("share", "of the returns' variance that the values explain; grows from 0 towards 1"),
    "clip_fraction": ("share", "of tokens whose ratio was clipped; 0.05 to 0.2 is normal, more means too large steps"),
    "approx_kl": ("nats per token", "k3 of the updated to the sampling policy; above 0.02 the steps are too large"),
    "first_ratio_error": ("", "largest |ratio - 1| in the first minibatch: rounding in bf16, 1e-4 in fp32 (CANON A1)"),
    "first_ratio_drift": ("", "mean |ratio - 1| in the first minibatch; above 0.05 sampling and update disagree (CANON A1)"),
    "return_mean": ("score", "mean return"),
    "skipped_steps": ("count", "optimizer steps left out because of a non-finite loss or gradient; should be 0"),
    "alarms": ("count", "alarms that ring (rlhf/alarms.py); should be 0"),
    "ptx_loss": ("nats", "language-model loss of the PPO-ptx batch"),
    "epochs_run": ("count", "epochs over the rollout before target_kl stopped them"),
    "eval_score_mean": ("score", "score_mean on held-out prompts"),
    "eval_gold_mean": ("0 to 1", "gold_mean on held-out prompts, for the report alone"),
    "eval_kl": ("nats per completion", "kl on held-out prompts"),
    "eval_likelihood": ("nats per completion", "likelihood on held-out prompts"),
    "eval_length_mean": ("tokens", "length on held-out prompts"),
    "eval_objective": ("score", "what PPO maximises: eval_score_mean - ppo.kl_coef·eval_kl + ppo.likelihood_coef·eval_likelihood"),
    "seconds_sample": ("s", "sampling"),
    "seconds_score": ("s", "reward model, or whatever scores"),
    "seconds_forward": ("s", "old log-probabilities, values and reference"),
    "seconds_update": ("s", "forward, backward and optimizer over all epochs"),
    "member": ("index", "reward model of the ensemble"),
    "peak_memory_mb": ("MiB", "largest memory of the main process so far: of its tensors on a GPU, else all that is resident"),
}


def check_names(figures: dict) -> None:
    """Refuses a figure without a line in the glossary. Raises KeyError."""
    unknown = [name for name in figures if name not in GLOSSARY]
    if unknown:
        raise KeyError(f"no line in the glossary of rlhf/metrics.py for {', '.join(unknown)}")
