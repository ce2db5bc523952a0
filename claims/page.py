"""CLAIMS.md and its figures, from results.jsonl alone."""

import math
from html import escape
from pathlib import Path

from claims.definitions import CLAIMS, Claim
from claims.results import (
    MEASURES, SCENES, Interval, Runs, arm_values, best, difference, mean, read_runs, verdict,
)
from formats.files import write_atomic

ROOT = Path(__file__).parents[1]
TITLES = dict(zip(
    MEASURES, ("any", "object", "colour", "number", "place", "coverage", "Δ", "words")))
INTRODUCTION = f"""# The papers' claims, measured on the built-in world

Written by `python -m claims page` from `claims/results.jsonl`; `claims/definitions.py` says which
runs test a claim and by which rule it holds. Every number is a mean over seeds (of the corrections,
the order and the base's sampled answers) with its 95 % t-interval, on the same {SCENES} held-out
scenes: per cent of descriptions with a false statement (any, object, colour, number, place), per
cent of the objects mentioned (coverage), over-generalisation Δ in points. Where an arm stands for
several learning rates, the table shows the best on these same scenes. A small world says how the
algorithms behave on it, not how large models do.
"""
COLOURS = "#3b6fb6"
ROW, WIDTH, LEFT = 22, 640, 250  # pixels


def write_page(folder: Path = ROOT, runs: Runs | None = None) -> None:
    """Write CLAIMS.md, and a figure per measured claim into claims/figures."""
    runs = read_runs() if runs is None else runs
    (folder / "claims/figures").mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, summary(runs)]
    for claim in CLAIMS.values():
        parts.append(section(claim, runs))
        if measured(claim, runs):
            write_atomic(folder / f"claims/figures/{claim.name}.svg", figure(claim, runs))
    write_atomic(folder / "CLAIMS.md", "\n".join(parts))


def measured(claim: Claim, runs: Runs) -> list[str]:
    """Return the labels of the arms that have runs."""
    return [label for label, alternatives in claim.arms.items() if best(runs, alternatives)]


def summary(runs: Runs) -> str:
    rows = ["| claim | better | than | difference | verdict |", "|---|---|---|---|---|"]
    for claim in CLAIMS.values():
        for better, worse in claim.pairs:
            gap, seeds = difference(runs, claim, better, worse, claim.measure)
            shown = f"{percent(gap, '+')} ({seeds} seeds)" if seeds else ""
            rows.append(f"| [{claim.name}](#{claim.name}) | {better} | {worse} | {shown} | "
                        f"{verdict(runs, claim, better, worse)} |")
    return "\n".join(rows) + "\n"


def section(claim: Claim, runs: Runs) -> str:
    """Return a claim's part of the page: statement, table, figure and what is missing."""
    text = f"{claim.statement} ({claim.source}) {claim.note}".strip()
    lines = [f"## {claim.name}\n", f"{text}\n"]
    labels = measured(claim, runs)
    if labels:
        lines += [f"| | seeds | {' | '.join(TITLES.values())} |", "|---" * (len(TITLES) + 2) + "|"]
        for label in ("base", *labels):
            by_seed = {m: list(arm_values(runs, claim, label, m).values()) for m in MEASURES}
            cells = [number(m, mean(numbers)) if numbers else "" for m, numbers in by_seed.items()]
            lines.append(f"| {label} | {len(by_seed[MEASURES[0]])} | {' | '.join(cells)} |")
        lines += ["", f"![{claim.name}](claims/figures/{claim.name}.svg)\n"]
        lines += [f"* {label}: `{best(runs, claim.arms[label], claim.measure)}`"
                  for label in labels]
    missing = [label for label in claim.arms if label not in labels]
    if missing:
        lines.append(f"\nNot measured yet: {', '.join(missing)} (`python -m claims run "
                     f"{claim.name}`).")
    return "\n".join(lines) + "\n"


def number(measure: str, interval: Interval) -> str:
    if measure == "length":
        return f"{interval[0]:.1f}"
    return percent(interval)


def percent(interval: Interval, sign: str = "") -> str:
    """Format a share and half the width of its interval, in per cent."""
    value, low, high = (100 * each for each in interval)
    return f"{value:{sign}.1f}" + ("" if math.isnan(low) else f" ± {(high - low) / 2:.1f}")


def figure(claim: Claim, runs: Runs) -> str:
    """Draw the measure of every arm, with its interval over seeds and the seeds as dots."""
    labels = ["base", *measured(claim, runs)]
    by_seed = [list(arm_values(runs, claim, label, claim.measure).values()) for label in labels]
    top = max(0.05, max(max(each) for each in by_seed))
    x = lambda value: f"{LEFT + (WIDTH - LEFT - 20) * max(0.0, value) / top:.1f}"
    height = ROW * len(labels) + 34
    parts = []
    for i, (label, each) in enumerate(zip(labels, by_seed)):
        y, (value, low, high) = ROW * (i + 0.7), mean(each)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.0f}" text-anchor="end">'
                     f"{escape(label)}</text>")
        if not math.isnan(low):
            parts.append(f'<line x1="{x(low)}" x2="{x(min(high, top))}" '
                         f'y1="{y:.0f}" y2="{y:.0f}"/>')
        parts += [f'<circle cx="{x(seed)}" cy="{y:.0f}" r="2.5" opacity="0.4"/>' for seed in each]
        parts.append(f'<circle cx="{x(value)}" cy="{y:.0f}" r="5"/>')
    for share in (0, top / 2, top):
        parts.append(f'<text x="{x(share)}" y="{height - 18}" text-anchor="middle">'
                     f"{100 * share:.0f}</text>")
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{height - 3}" text-anchor="middle">'
                 f"{escape(claim.measure)}, %</text>")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'font-family="sans-serif" font-size="12" fill="#888" stroke-width="2">'
            f'<g stroke="{COLOURS}" fill="{COLOURS}">'
            + "".join(part for part in parts if "<text" not in part) + "</g>"
            + "".join(part for part in parts if "<text" in part) + "</svg>\n")
