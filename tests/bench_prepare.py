"""How fast `prepare` reads a large file, and in how much memory: a benchmark, no test.

    python -m tests.bench_prepare --rows 2000000 [--tokenizer FOLDER]

Writes preferences of about a kilobyte each into a temporary folder (as JSON lines, or with --parquet as one Parquet file), runs `prepare` on
them in a process of its own, and prints rows a second, MB a second, the seconds of CPU that it and the processes it started took, and their
largest resident memory, summed (pages that they share count more than once). With a tokenizer: also how long SFT waits for its first batch,
the first time, when the demonstrations are tokenised, and the second time. Everything is deleted again.
"""

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # accelerate brings it

WORDS = ["river", "lantern", "walks", "slowly", "under", "seven", "bright", "clouds", "while", "nobody", "counts", "small", "green", "boats"]
POLL = 0.1  # seconds


def rows(count: int):
    """Preferences with distinct prompts; a row takes about 1,000 bytes."""
    rng = random.Random(1)
    sentences = [" ".join(rng.choices(WORDS, k=12)).capitalize() + "." for _ in range(5000)]
    for number in range(count):
        prompt, chosen, rejected = (" ".join(rng.choices(sentences, k=k)) for k in (3, 6, 5))
        yield {"prompt": f"Question {number}: {prompt}", "chosen": chosen, "rejected": rejected}


def write(path: Path, count: int) -> None:
    """The rows as JSON lines or, by the file's name, as Parquet."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_generator(rows, gen_kwargs={"count": count}, cache_dir=str(path.parent / "cache")).to_parquet(path)
        return
    with open(path, "w", encoding="utf-8") as file:
        for row in rows(count):
            file.write(json.dumps(row) + "\n")


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident memory (bytes) of a command and the processes below it. Raises CalledProcessError when it fails."""
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # one of them ended meanwhile
                peak = max(peak, sum(one.memory_info().rss for one in (watched, *watched.children(recursive=True))))
            time.sleep(POLL)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, used.ru_utime + used.ru_stime, peak


def until_first_batch(train: Path, tokenizer: str) -> float:
    """Seconds until SFT on a file of demonstrations has its first batch, model and imports left out."""
    from rlhf.encoded import demonstrations
    from rlhf.models import load_encoder
    from rlhf.trl_trainers import count_steps, length_grouped_order

    encoder, began = load_encoder(tokenizer), time.perf_counter()
    pairs = demonstrations(train, encoder, 512, 512)
    order = length_grouped_order(pairs.lengths.tolist(), 32, count_steps(len(pairs), 32, 1.0), seed=1)
    assert len(pairs[order[:32]]) == 32
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--parquet", action="store_true")
    options.add_argument("--tokenizer", metavar="FOLDER")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("rows.parquet" if arguments.parquet else "rows.jsonl")
        write(file, arguments.rows)
        command = [sys.executable, "-m", "stages.prepare", "--quiet", f"run.dir={folder}/run", f"data.preferences={file}"]
        seconds, cpu, peak = measured(command)
        size = file.stat().st_size
        print(f"{arguments.rows:,} rows, {size / 1e9:.2f} GB: {seconds:.1f} s, {arguments.rows / seconds:,.0f} rows/s, "
              f"{size / seconds / 1e6:.0f} MB/s, {cpu:.0f} CPU seconds, peak {peak / 1e9:.2f} GB")
        if arguments.tokenizer:
            file.unlink()
            waited = [until_first_batch(Path(folder) / "run/data/demonstrations/train.jsonl", arguments.tokenizer) for _ in range(2)]
            print(f"first batch of SFT after {waited[0]:.1f} s, tokenising included, and after {waited[1]:.1f} s the second time")


if __name__ == "__main__":
    main()
