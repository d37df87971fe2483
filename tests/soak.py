"""A long PPO run on a tiny model: does memory, or anything else that a process holds, grow?

    python -m tests.soak                    # 1,000 PPO steps
    python -m tests.soak --steps 300

Runs `rlhf ppo` in a process of its own behind the earlier stages of configs/tiny.yaml, and looks at it from outside after every step that it
logs: resident memory, open files, threads, processor time (which other work on the machine lengthens less than the wall's). The learning rate
is nearly 0, so that step 1,000 has as much to do as step 100. Prints a table, and `flat` last where from the first tenth to the end memory
stays within 5 %, files and threads do not grow, and a step of the last third takes at most 25 % more processor time than one of the first;
exit code 0 then.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.kills import fork, preload

SETTINGS = ("world.documents=500", "pretrain.steps=10", "sft.epochs=0.2", "collect.prompts=40", "ppo.batch_size=16", "ppo.minibatches=2",
            "ppo.lr=1e-9", "ppo.eval_every=50", "ppo.save_every=50", "run.threads=1")
EARLIER = ("prepare", "pretrain", "sft", "collect", "reward")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args(argv).steps
    preload()
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        for stage in (*EARLIER, "ppo"):
            [process] = fork([stage, "--config", "configs/tiny.yaml", f"run.dir={run}", f"ppo.rollouts={steps}", *SETTINGS], log)
            held = _watch(process, run / "ppo" / "metrics.jsonl") if stage == "ppo" else []
            process.join()
            if process.exitcode:
                sys.exit(log.read_text()[-3000:])
        rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return _tell(steps, held, [row["seconds"] for row in rows if "seconds" in row])


def _watch(process, metrics: Path) -> list[tuple[int, int, int, int, float]]:
    """(steps done, resident KiB, open files, threads, seconds of processor time) after every step that is seen."""
    held, done, proc = [], 0, Path("/proc") / str(process.pid)
    while process.is_alive():
        lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if lines > done:
            done = lines
            try:
                status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
                ticks = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))  # utime and stime
                held.append((done, int(status["VmRSS"].split()[0]), len(os.listdir(proc / "fd")), int(status["Threads"]),
                             ticks / os.sysconf("SC_CLK_TCK")))
            except (OSError, KeyError):  # it just ended
                break
        time.sleep(0.02)
    return held


def _tell(steps: int, held: list[tuple[int, int, int, int, float]], seconds: list[float]) -> int:
    print("steps  memory MiB  files  threads  processor s")
    for i in range(10):
        step, memory, files, threads, spent = min(held, key=lambda row: abs(row[0] - steps * (i + 1) // 10))
        print(f"{step:5}  {memory / 1024:10.1f}  {files:5}  {threads:7}  {spent:11.1f}")
    from_tenth = [row for row in held if row[0] >= steps // 10]
    _, memory, files, threads, _ = from_tenth[0]
    drift = [row[1] / memory - 1 for row in from_tenth]
    third = len(held) // 3
    early, late = ((part[-1][4] - part[0][4]) / (part[-1][0] - part[0][0]) for part in (held[:third], held[-third:]))
    wall = statistics.median(seconds[: len(seconds) // 3]), statistics.median(seconds[-len(seconds) // 3 :])
    print(f"memory from step {from_tenth[0][0]} on: {min(drift):+.1%} to {max(drift):+.1%}; files {files}, later at most "
          f"{max(row[2] for row in from_tenth)}; threads {threads}, later at most {max(row[3] for row in from_tenth)}; a step takes {early:.3f} s of "
          f"processor time in the first third, {late:.3f} s in the last (median wall time {wall[0]:.3f} and {wall[1]:.3f} s)")
    # A checkpoint or a rollout that is being written holds a file open for a moment: many steps see none
    flat = (max(map(abs, drift)) <= 0.05 and statistics.median(r[2] for r in from_tenth[-100:]) <= files and from_tenth[-1][3] <= threads
            and late <= 1.25 * early)
    print("flat" if flat else "NOT flat")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
