"""Alarms of a PPO run: figures that say a policy collapses or that the arithmetic disagrees with itself, and what to change."""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf.comparison import MAX_KL_NATS

RATIO_DRIFT = 0.05  # bf16 passes of differently shaped batches differ by a few percent (CANON A1); 0.036 at most with SmolLM2
RATIO_ERROR = 1.0  # of the worst token; bf16 moved single tokens of SmolLM2 by a third
SAME_SCORE = 1e-6  # rounding alone
FEW_END = 0.1  # fewer completions that end by themselves tell nothing about the others, which all have the score ppo.missing_eos_score
# Set by hand, in no paper: coarse, because drift is what PPO is for, and compared with the run's first rollout, because tasks differ
ENTROPY_LEFT = 0.1  # of it: where tokens were chosen as if among 2.7 equal ones (1 nat), 1.1 are left, which is no choice
EOS_RATE_LOST = 0.2  # one completion in five more is cut off; by chance rollouts of 128 differ by 0.12 at most (95 %, at a rate of 1/2)
DISTINCT_2_LEFT = 0.4  # of it: more than half of the variety is gone
LENGTH_RANGE = (0.5, 2.0)  # times it: half or double is another habit of answering, not another wording
KL_AT_START = 1e-3  # nats per completion (CANON A2)


@dataclass(frozen=True)
class Alarm:
    """`rings(now, first)`: figures of a rollout and of the run's first one -> True when something is wrong; `advice` says what to change."""

    name: str
    rings: Callable[[dict, dict], bool]
    says: str
    advice: str


ALARMS = (
    Alarm("first_ratio_drift", lambda now, first: now["first_ratio_drift"] > RATIO_DRIFT,
          "sampling and update disagree about the same tokens (mean |ratio - 1| {first_ratio_drift:.3f}, CANON A1)",
          "try run.precision=fp32; if it stays, report a bug"),
    Alarm("first_ratio_error", lambda now, first: now["first_ratio_error"] > RATIO_ERROR,
          "sampling and update disagree about a token (largest |ratio - 1| {first_ratio_error:.3f}, CANON A1)",
          "try run.precision=fp32; if it stays, report a bug"),
    Alarm("entropy", lambda now, first: now["entropy"] < ENTROPY_LEFT * first["entropy"],
          "the policy has nearly stopped choosing (entropy {entropy:.3f} nats a token)", "raise ppo.kl_coef or lower ppo.lr"),
    Alarm("score_std", lambda now, first: now["score_std"] < SAME_SCORE,
          "all answers of the rollout have the same score, which teaches nothing",
          "answers that do not end all get ppo.missing_eos_score: raise data.max_completion_tokens if hardly any ends; else look at ppo.score"),
    Alarm("eos_rate", lambda now, first: now["eos_rate"] < max(first["eos_rate"] - EOS_RATE_LOST, FEW_END),
          "completions hardly end by themselves ({eos_rate:.0%} do, {first[eos_rate]:.0%} at the start)",
          "lower ppo.missing_eos_score, or raise data.max_completion_tokens"),
    Alarm("distinct_2", lambda now, first: now["distinct_2"] < DISTINCT_2_LEFT * first["distinct_2"],
          "the answers repeat themselves (distinct-2 {distinct_2:.2f})", "raise ppo.kl_coef; read the rollouts for what the reward model overrates"),
    Alarm("kl", lambda now, first: now["kl"] > MAX_KL_NATS,
          "the policy is far from the SFT model (KL {kl:.0f} nats a completion)", "raise ppo.kl_coef, or set ppo.kl_target"),
    Alarm("length_mean", lambda now, first: not LENGTH_RANGE[0] <= now["length_mean"] / first["length_mean"] <= LENGTH_RANGE[1],
          "the length runs away ({length_mean:.0f} tokens on average, {first[length_mean]:.0f} at the start)",
          "raise ppo.kl_coef; what is paid may be length for its own sake, or ending (ppo.missing_eos_score)"),
    Alarm("skipped_steps", lambda now, first: now["skipped_steps"] > 0,
          "{skipped_steps} optimizer steps had no finite gradient and were left out", "lower ppo.lr; look at the rollout's prompts and scores"),
)


def ringing(now: dict, first: dict) -> list[tuple[str, str]]:
    """(name, message with advice) of every alarm that rings for a rollout's figures; `first`: those of the run's first rollout.

    Every alarm bears the name of its figure; a figure that is missing or null rings nothing.
    """
    found = [(a.name, f"{a.says.format(**now, first=first)}; {a.advice}") for a in ALARMS
             if now.get(a.name) is not None and first.get(a.name) is not None and a.rings(now, first)]
    if now is first and now.get("kl") is not None and abs(now["kl"]) > KL_AT_START:
        found.append(("kl_at_start", f"KL to the SFT model is {now['kl']:.4f} before anything was learned (CANON A2); report a bug"))
    return found


def history(rows: list[dict]) -> list[str]:
    """A sentence for every alarm that rang in a run, from the lines of its metrics.jsonl (lines of evaluations are passed over)."""
    rollouts = [row for row in rows if row.get("first_ratio_error") is not None]
    rang: dict[str, list[tuple[int, str]]] = {}
    for row in rollouts:
        for name, message in ringing(row, rollouts[0]):
            rang.setdefault(name, []).append((row["step"], message))
    return [f"Alarm in {len(found)} of {len(rollouts)} rollouts, first in rollout {found[0][0]}: {found[0][1]}." for found in rang.values()]
