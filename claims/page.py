"""CLAIMS.md and its figures, from results.jsonl alone."""

import math
from html import escape
from pathlib import Path

from claims.definitions import CLAIMS, Claim
from claims.results import (
    MEASURES, SCENES, Interval, Runs, arm_values, best, difference, mean, read_runs, verdict,
)
from evaluation.charts import number as tick, ticks
from formats.files import write_atomic

ROOT = Path(__file__).parents[1]
TITLES = dict(zip(
    MEASURES, ("any", "object", "colour", "number", "place", "coverage", "questions", "Δ",
               "words", "agreement")))
INTRODUCTION = f"""# The papers' claims, measured on the built-in world

Written by `python -m claims page` from `claims/results.jsonl`; `claims/definitions.py` says which
runs test a claim and by which rule it holds. Every number is a mean over seeds (of the corrections,
the order and the base's sampled answers) with its 95 % t-interval, on the same {SCENES} held-out
scenes: per cent of descriptions with a false statement (any, object, colour, number, place), per
cent of the objects mentioned (coverage), right answers to short questions about seven topics
(questions; a number of seeds in brackets: the others did not keep it), over-generalisation Δ in
points. Where an arm stands for several learning rates, the table shows the best on these same
scenes. A small world shows how the algorithms behave on it, not how large models behave.
"""
COLOUR = "#3b6fb6"
LINES = (COLOUR, "#c8553d", "#4f9d69", "#a06cd5", "#c99700", "#7f7f7f")
ROW, WIDTH, LEFT, PANEL = 22, 640, 250, 180  # pixels


def write_page(folder: Path = ROOT, runs: Runs | None = None) -> None:
    """Write CLAIMS.md, and a figure per measured claim into claims/figures."""
    runs = read_runs() if runs is None else runs
    (folder / "claims/figures").mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, summary(runs)]
    for claim in CLAIMS.values():
        parts.append(section(claim, runs))
        if measured(claim, runs):
            drawn = amounts(claim, runs) or figure(claim, runs)
            write_atomic(folder / f"claims/figures/{claim.name}.svg", drawn)
            if drawn := curves(claim, runs):
                write_atomic(folder / f"claims/figures/{claim.name}_kl.svg", drawn)
    write_atomic(folder / "CLAIMS.md", "\n".join(parts))


def measured(claim: Claim, runs: Runs) -> list[str]:
    """Return the labels of the arms that have runs."""
    return [label for label, alternatives in claim.arms.items()
            if best(runs, alternatives, claim.measure)]


def summary(runs: Runs) -> str:
    missing, rows = {}, ["| claim | better | than | difference | verdict |", "|---" * 5 + "|"]
    for claim in CLAIMS.values():
        for better, worse in claim.pairs:
            gap, seeds = difference(runs, claim, better, worse, claim.measure)
            if not seeds:
                missing[claim.name] = missing.get(claim.name, 0) + 1
                continue
            rows.append(f"| [{claim.name}](#{claim.name}) | {better} | {worse} | "
                        f"{number(claim.measure, gap, '+')} ({seeds} seed{'s' * (seeds > 1)}) | "
                        f"{verdict(runs, claim, better, worse)} |")
    listed = (f"[{name}](#{name}) ({count} of {len(CLAIMS[name].pairs)})"
              for name, count in missing.items())
    left = f"\nComparisons not measured yet: {', '.join(listed)}.\n" if missing else ""
    return "\n".join(rows) + f"\n{left}"


def section(claim: Claim, runs: Runs) -> str:
    """Return a claim's part of the page: statement, table, figures and missing arms."""
    text = f"{claim.statement} ({claim.source}) {claim.note}".strip()
    lines = [f"## {claim.name}\n", f"{text}\n"]
    labels = measured(claim, runs)
    if labels:
        table = {label: {m: found for m in MEASURES
                         if (found := list(arm_values(runs, claim, label, m).values()))}
                 for label in ("base", *labels)}
        table = {label: row for label, row in table.items() if row}
        shown = [m for m in MEASURES if any(m in row for row in table.values())]
        lines += [f"| | seeds | {' | '.join(TITLES[m] for m in shown)} |",
                  "|---" * (len(shown) + 2) + "|"]
        for label, row in table.items():
            seeds = max(map(len, row.values()))
            cells = [number(m, mean(row[m])) + f" ({len(row[m])})" * (len(row[m]) < seeds)
                     if m in row else "" for m in shown]
            lines.append(f"| {label} | {seeds} | {' | '.join(cells)} |")
        lines += ["", f"![{claim.name}](claims/figures/{claim.name}.svg)\n"]
        if curves(claim, runs):
            lines.append(f"![{claim.name}, by KL](claims/figures/{claim.name}_kl.svg)\n")
        lines += [f"* {label}: `{best(runs, claim.arms[label], claim.measure)}`"
                  for label in labels]
    missing = [label for label in claim.arms if label not in labels]
    if missing:
        lines.append(f"\nNot measured yet: {', '.join(missing)} (`python -m claims run "
                     f"{claim.name}`).")
    return "\n".join(lines) + "\n"


def number(measure: str, interval: Interval, sign: str = "") -> str:
    """Format a share in per cent, or a length in words, and half the width of its interval."""
    value, low, high = ((1 if measure == "length" else 100) * each for each in interval)
    return f"{value:{sign}.1f}" + ("" if math.isnan(low) else f" ± {(high - low) / 2:.1f}")


def figure(claim: Claim, runs: Runs) -> str:
    """Draw the measure of every arm, with its interval over seeds and the seeds as dots."""
    found = {label: list(arm_values(runs, claim, label, claim.measure).values())
             for label in ("base", *measured(claim, runs))}
    labels, by_seed = zip(*((label, each) for label, each in found.items() if each))
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
    scale, unit = (1, "words") if claim.measure == "length" else (100, "%")
    for share in (0, top / 2, top):
        parts.append(f'<text x="{x(share)}" y="{height - 18}" text-anchor="middle">'
                     f"{scale * share:.0f}</text>")
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{height - 3}" text-anchor="middle">'
                 f"{escape(claim.measure)}, {unit}</text>")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'font-family="sans-serif" font-size="12" fill="#888" stroke-width="2">'
            f'<g stroke="{COLOUR}" fill="{COLOUR}">'
            + "".join(part for part in parts if "<text" not in part) + "</g>"
            + "".join(part for part in parts if "<text" in part) + "</svg>\n")


def curves(claim: Claim, runs: Runs) -> str:
    """Draw the logged metrics of seed 0 against the KL to the reference; "" if there are none."""
    panels = []
    arms = [(label, results["trace"]) for label in measured(claim, runs)
            if (results := runs.get((best(runs, claim.arms[label], claim.measure), 0), {}))
            and results.get("trace", {}).get("objective/kl")]
    colours = dict(zip((label for label, _ in arms), LINES))
    for metric in claim.curves:
        series = {label: [(*point, 0.0) for point in
                          sorted({*zip(trace["objective/kl"], trace[metric])})]
                  for label, trace in arms if metric in trace}
        if series:
            most = max(kl for points in series.values() for kl, _, _ in points)
            panels.append(panel(f"{metric}, by KL (nats per completion)", series, colours,
                                [(kl, tick(kl)) for kl in ticks(0, most)]))
    return stacked(panels) if panels else ""


def amounts(claim: Claim, runs: Runs) -> str:
    """Draw the measure against the number of rows, with its interval over seeds.

    Its arms are named by number and kind, as in "200 corrections"; "" if they are not.
    """
    series: dict[str, list[tuple[float, float, float]]] = {}
    counts = []
    for label in measured(claim, runs):
        count, _, kind = label.partition(" ")
        if not count.isdigit():
            return ""
        value, low, high = mean([*arm_values(runs, claim, label, claim.measure).values()])
        half = 0.0 if math.isnan(low) else (high - low) / 2
        series.setdefault(kind, []).append((math.log2(int(count)), 100 * value, 100 * half))
        counts.append(int(count))
    across = [(math.log2(count), str(count)) for count in sorted({*counts})]
    return stacked([panel(f"{claim.measure}, %, by number (log scale)", series,
                          dict(zip(series, LINES)), across)])


def stacked(panels: list[str]) -> str:
    """Put panels below each other."""
    body = "".join(f'<g transform="translate(0 {PANEL * i})">{each}</g>'
                   for i, each in enumerate(panels))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {PANEL * len(panels)}" '
            'font-family="sans-serif" font-size="12" fill="#888" stroke-width="1.5">'
            f"{body}</svg>\n")


def panel(
    title: str, series: dict[str, list[tuple[float, float, float]]], colours: dict[str, str],
    across: list[tuple[float, str]],
) -> str:
    """Draw lines with their names at the right.

    Args:
        series: by name, (x, y, half the width of the interval, or 0 for none).
        across: marks of the x axis, ascending, with their labels.
    """
    ends = [y + side * half for points in series.values() for _, y, half in points
            for side in (-1, 1)]
    (first, _), (last, _), up = across[0], across[-1], ticks(min(ends), max(ends))
    px = lambda x: 60 + (WIDTH - 260) * (x - first) / (last - first or 1)
    py = lambda y: PANEL - 40 - (PANEL - 60) * (y - up[0]) / (up[-1] - up[0])
    parts = [f'<text x="60" y="12">{escape(title)}</text>']
    parts += [f'<text x="{px(x):.0f}" y="{PANEL - 22}" text-anchor="middle">{label}</text>'
              for x, label in across]
    parts += [f'<text x="52" y="{py(y) + 4:.0f}" text-anchor="end">{tick(y)}</text>'
              f'<line x1="60" x2="{WIDTH - 200}" y1="{py(y):.0f}" y2="{py(y):.0f}" '
              'stroke="#8884"/>' for y in up]
    for i, (label, points) in enumerate(series.items()):
        colour = colours[label]
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y, _ in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}"/>'
                     f'<text x="{WIDTH - 190}" y="{24 + 16 * i}" fill="{colour}">'
                     f"{escape(label)}</text>")
        for x, y, half in points:
            if half or len(points) == 1:
                parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"/>')
            if half:
                parts.append(f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(y - half):.1f}" '
                             f'y2="{py(y + half):.1f}" stroke="{colour}"/>')
    return "".join(parts)
