"""The numbers of finished runs, kept in results.jsonl, and statistics over seeds."""

import json
import re
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
            "hallucination/position", "coverage", "questions", "over_generalisation", "length",
            "agreement")
TRACED = ("objective/kl", "truth/hallucination", "score/rm", "score/held_out")  # while training
POINTS = 40  # of these, at most
FOLDER = Path("runs/claims")  # of all runs
COVERAGE = 0.01  # the most that an arm may lose against the other
SCENES = 300  # held-out scenes of every run
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantiles, 1..9 degrees
Interval = tuple[float, float, float]  # mean, low, high
Runs = dict[tuple[str, int], dict[str, dict[str, float]]]  # (options, seed): {"after": measures}


def read_runs(path: Path = RESULTS) -> Runs:
    """Return every finished run, with the measures before and after and of the blind baselines."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["options"], row["seed"]): row["results"] for row in rows}


def do_run(options: str, seed: int, path: Path = RESULTS) -> None:
    """Train and measure, and add the numbers to the results.

    Raises:
        RuntimeError: a command failed; its messages are on the console.
    """
    folder = make(options, seed)
    found = {part: {name: round(metrics[name]["value"], 5) for name in MEASURES if name in metrics}
             | short_answers(metrics)
             for part, (metrics, _) in read_results(folder / "results.json").items()}
    if (log := folder / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines = lines[:: len(lines) // POINTS + 1]
        found["trace"] = {name: [round(line[name], 4) for line in lines] for name in TRACED
                          if all(name in line for line in lines)}
    runs = read_runs(path) | {(options, seed): found}
    rows = [{"options": each, "seed": number, "results": results}
            for (each, number), results in sorted(runs.items())]
    write_atomic(path, jsonl(rows))


def short_answers(metrics: dict) -> dict[str, float]:
    """Return {"questions": the mean share of right answers over the kinds of short questions}."""
    shares = [found["value"] for name, found in metrics.items()
              if name.startswith("question/") or name == "pope/random/accuracy"]
    return {"questions": round(float(np.mean(shares)), 5)} if shares else {}


def make(options: str, seed: int) -> Path:
    """Do a run's missing commands, and the last one in any case; return the folder with results.

    The last of several commands, joined by "then", may name the folder of those before it: {here}
    with the same seed, {next} with the next seed.
    """
    folder = FOLDER / f"{slug(options)}-{seed}"
    first, _, last = options.rpartition(" then ")
    for field, number in (("{here}", seed), ("{next}", seed + 1)):
        if field in last:
            made = FOLDER / f"{slug(first)}-{number}"
            last = last.replace(field, str(made))
            if not (made / "model" / "config.json").exists():
                make(first, number)
    arguments = shlex.split(last)
    if arguments[0] == "evaluate.py":
        arguments += ["--scenes", str(SCENES), "--output", str(folder)]
    else:
        arguments = ["train.py", *arguments, "--test_scenes", str(SCENES), "--overwrite",
                     "--out", str(folder)]
    script = str(Path(__file__).parents[1] / arguments[0])
    command = [sys.executable, script, *arguments[1:], "--seed", str(seed)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"failed: {shlex.join(command)}")
    return folder


def slug(options: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", options.lower().replace("--", "")).strip("-")


def values(runs: Runs, options: str, measure: str, part: str = "after") -> dict[int, float]:
    """Return the measure of all seeds of a command line, by seed."""
    return {seed: results[part][measure]
            for (each, seed), results in runs.items()
            if each == options and measure in results.get(part, ())}


def mean(numbers: list[float]) -> Interval:
    """Return the mean and its 95 % t-interval; of one number, no interval (NaN)."""
    centre = float(np.mean(numbers))
    if len(numbers) < 2:
        return centre, float("nan"), float("nan")
    half = T[min(len(numbers) - 2, len(T) - 1)] * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    return centre, centre - half, centre + half


def best(runs: Runs, alternatives: tuple[str, ...], measure: str = ANY) -> str | None:
    """Return the command line that represents an arm, or None if none of its runs is done.

    It has the lowest measure among those that lose at most a point of coverage against the base; if
    all lose more, it is the one that loses least. Only seeds count that all of them have, if any.
    """
    done = {options: found for options in alternatives if (found := values(runs, options, measure))}
    shared = set.intersection(*map(set, done.values())) if done else set()
    scores = {}
    for options, errors in done.items():
        part_of = lambda numbers: [each for seed, each in numbers.items()
                                   if seed in (shared or errors)] or [0.0]
        before, after = (np.mean(part_of(values(runs, options, "coverage", part)))
                         for part in ("before", "after"))
        scores[options] = max(0.0, before - after - COVERAGE), np.mean(part_of(errors))
    return min(scores, key=scores.__getitem__) if scores else None


def arm_values(runs: Runs, claim: Claim, label: str, measure: str) -> dict[int, float]:
    """Return an arm's measure by seed; "base" is the model that all arms start from."""
    if label == "base":
        found = {}
        for alternatives in claim.arms.values():
            for options in alternatives:
                if "--model {" not in options and measure != "agreement":  # starts from the base
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
    reverse = high < 0 if claim.higher else low > 0
    if claim.higher:
        low, high = claim.margin - high, claim.margin - low
    (lost, _, _), _ = difference(runs, claim, worse, better, "coverage")  # NaN where not measured
    if high < 0:
        return f"only at {100 * lost:.1f} points less coverage" if lost > COVERAGE else "holds"
    if low > 0 and -lost > COVERAGE:
        return f"the opposite, but only at {-100 * lost:.1f} points less coverage"
    if low > 0:
        return "does not hold: the opposite does" if reverse else "does not hold"
    return "not decided by these seeds"
