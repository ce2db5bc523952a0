"""The numbers of finished runs, kept in results.jsonl, and statistics over seeds."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from claims.definitions import ANY, Claim
from evaluation import read_results
from formats.files import jsonl, write_atomic

RESULTS = Path(__file__).with_name("results.jsonl")
MEASURES = (ANY, "hallucination/object", "hallucination/attribute", "hallucination/number",
            "hallucination/position", "coverage", "over_generalisation", "length")
COVERAGE = 0.01  # that an arm may lose against the other
SCENES = 300  # held-out scenes of every run
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantiles, 1..9 degrees
Interval = tuple[float, float, float]  # mean, low, high
Runs = dict[tuple[str, int], dict[str, dict[str, float]]]  # (options, seed): {"after": measures}


def read_runs(path: Path = RESULTS) -> Runs:
    """Return every finished run, with the measures before and after and of the blind baselines."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["options"], row["seed"]): row["results"] for row in rows}


def do_run(options: str, seed: int, folder: Path, path: Path = RESULTS) -> None:
    """Train and measure, and add the numbers to the results.

    Raises:
        RuntimeError: train.py failed; its messages are on the console.
    """
    train = Path(__file__).parents[1] / "train.py"
    command = [sys.executable, str(train), *shlex.split(options), "--seed", str(seed),
               "--test_scenes", str(SCENES), "--out", str(folder), "--overwrite"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"failed: {shlex.join(command)}")
    found = {part: {name: round(metrics[name]["value"], 5) for name in MEASURES if name in metrics}
             for part, (metrics, _) in read_results(folder / "results.json").items()}
    runs = read_runs(path) | {(options, seed): found}
    rows = [{"options": each, "seed": number, "results": results}
            for (each, number), results in sorted(runs.items())]
    write_atomic(path, jsonl(rows))


def values(runs: Runs, options: str, measure: str, part: str = "after") -> dict[int, float]:
    """Return the measure of all seeds of a command line, by seed."""
    return {seed: results[part][measure]
            for (each, seed), results in runs.items()
            if each == options and measure in results[part]}


def mean(numbers: list[float]) -> Interval:
    """Return the mean and its 95 % t-interval; of one number, no interval (NaN)."""
    centre = float(np.mean(numbers))
    if len(numbers) < 2:
        return centre, float("nan"), float("nan")
    half = T[min(len(numbers) - 2, len(T) - 1)] * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    return centre, centre - half, centre + half


def best(runs: Runs, alternatives: tuple[str, ...], measure: str = ANY) -> str | None:
    """Return the command line that represents an arm, or None if none of its runs is done.

    It is the one with the lowest measure among those that lose at most a point of coverage against
    the base; if all lose more, the one with the highest coverage.
    """
    scores = {}
    for options in alternatives:
        if after := values(runs, options, "coverage"):
            before = values(runs, options, "coverage", "before")
            lost = np.mean(list(before.values())) - np.mean(list(after.values()))
            error = np.mean(list(values(runs, options, measure).values()))
            scores[options] = (max(0.0, lost - COVERAGE), error)
    return min(scores, key=scores.__getitem__) if scores else None


def arm_values(runs: Runs, claim: Claim, label: str, measure: str) -> dict[int, float]:
    """Return an arm's measure by seed; "base" is what all arms start from."""
    if label == "base":
        found = {}
        for alternatives in claim.arms.values():
            for options in alternatives:
                found |= values(runs, options, measure, "before")
        return found
    options = best(runs, claim.arms[label], claim.measure)
    return values(runs, options, measure) if options else {}


def difference(
    runs: Runs, claim: Claim, better: str, worse: str, measure: str
) -> tuple[Interval, int]:
    """Return the paired difference better - worse over the seeds that both have, and their number.

    (NaN, NaN, NaN), 0 where there is no such seed.
    """
    one, two = (arm_values(runs, claim, label, measure) for label in (better, worse))
    both = sorted(one.keys() & two.keys())
    if not both:
        return (float("nan"),) * 3, 0
    return mean([one[seed] - two[seed] for seed in both]), len(both)


def verdict(runs: Runs, claim: Claim, better: str, worse: str) -> str:
    """Apply the rule of `Claim`."""
    (_, low, high), seeds = difference(runs, claim, better, worse, claim.measure)
    if seeds < 2:
        return "one seed decides nothing" if seeds else "not measured yet"
    (lost, _, _), _ = difference(runs, claim, worse, better, "coverage")
    if high < 0:
        return "holds" if lost <= COVERAGE else f"only at {100 * lost:.1f} points less coverage"
    return "does not hold: the opposite does" if low > 0 else "not decided by these seeds"
