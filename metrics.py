"""Measures with intervals: ratios of sums, one bootstrap for all of them, tables and results.json.

A *measure* is a list of terms (coefficient, numerators, denominators), one number per item (a
scene, an image, a question) in either array; its value is the sum over terms of

    coefficient * sum(numerators) / sum(denominators)

Rates, accuracy, F1 = 2 TP / (2 TP + FP + FN) and differences of rates all have this form. A
bootstrap resample is then a vector of weights on the items, and a measure in a thousand resamples
is two matrix products. The same resamples for two models that answered the same items give *paired*
differences: what makes a scene hard for both cancels out.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from files import read_json, write_atomic

Terms = list[tuple[float, np.ndarray, np.ndarray]]
RESAMPLES = 1000
PER_KIND = "mmhal/kind/"  # measures that the tables leave out; results.json has them


def resampled(items: int, seed: int) -> np.ndarray:
    """(RESAMPLES, items): how often each item is in each bootstrap resample."""
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), RESAMPLES)


def values(terms: Terms, weights: np.ndarray) -> np.ndarray:
    """A measure under each row of weights (W, items): (W,); nan where a denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sum(c * (weights @ above) / (weights @ below) for c, above, below in terms)


def grouped(measures: dict[str, Terms], groups: Sequence | None) -> dict[str, Terms]:
    """The same measures with the items of one group (of one image) added up to one item.

    Items of a group are then resampled together: eight answers about one image are not eight
    independent observations. Groups come in order of first appearance; None groups nothing.
    """
    if groups is None:
        return measures
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = np.array([number[group] for group in groups], dtype=int)
    total = lambda numbers: np.bincount(index, numbers, len(number))
    return {
        name: [(c, total(above), total(below)) for c, above, below in terms]
        for name, terms in measures.items()
    }


def interval(value: float, samples: np.ndarray) -> dict:
    """A value with its 95 % percentile interval; resamples where it is undefined do not count."""
    low, high = np.nanpercentile(samples, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high)}


def with_intervals(measures: dict[str, Terms], seed: int = 0) -> dict:
    """{name: {"value", "low", "high"}} of all measures that are defined on these items.

    Left out is what would divide by zero, such as the precision of a model that never says yes.
    """
    items = len(next(iter(measures.values()))[0][1])
    if items == 0:
        raise ValueError("nothing to measure: there are no answers")
    weights, found = resampled(items, seed), {}
    for name, terms in measures.items():
        value = values(terms, np.ones((1, items)))[0]
        if np.isfinite(value):
            found[name] = interval(value, values(terms, weights))
    return found


def paired(before: dict[str, Terms], after: dict[str, Terms], seed: int = 0) -> dict:
    """{name: {"value", "low", "high"}} of the differences after - before on the same items."""
    items = len(next(iter(before.values()))[0][1])
    weights, found = resampled(items, seed), {}
    for name in (name for name in before if name in after):
        both = np.concatenate([np.ones((1, items)), weights])
        difference = values(after[name], both) - values(before[name], both)
        if np.isfinite(difference[0]):
            found[name] = interval(difference[0], difference[1:])
    return found


# ------------------------------------------------------------------------------------ what is shown


def unit(name: str) -> str:
    """In what a measure is shown: "words", "of 6" (MMHal's ratings), or "%"."""
    rating = name in ("score", "mmhal/score") or name.startswith(("score/", PER_KIND))
    return "words" if name == "length" else "of 6" if rating else "%"


def shown(name: str, value: float, sign: str = "") -> str:
    """A value as a person reads it, without its unit; two decimals for ratings, else one."""
    if unit(name) == "of 6":
        return f"{value:{sign}.2f}"
    return f"{value if unit(name) == 'words' else 100 * value:{sign}.1f}"


def bracket(name: str, metric: dict, sign: str = "") -> str:
    return f"[{shown(name, metric['low'], sign)}, {shown(name, metric['high'], sign)}]"


def label(name: str) -> str:
    return name if unit(name) == "%" else f"{name} ({unit(name)})"


def relative(old: float, new: float) -> str:
    """The relative change, where there is one."""
    return f"{100 * (new - old) / old:+.0f} %" if old > 0 else ""


def table(before: dict, after: dict) -> str:
    """Metrics before and after training, one line each, with 95 % intervals.

    Args:
        before, after: {name: {"value", "low", "high"}}, as `evaluate.measure_world` returns them.
            Shares are printed in per cent.
    """
    rows = [["%", "before", "95 % interval", "after", "95 % interval", "change", "relative"]]
    for name in (name for name in before if name in after and not name.startswith(PER_KIND)):
        old, new = before[name]["value"], after[name]["value"]
        rows.append([
            label(name), shown(name, old), bracket(name, before[name]),
            shown(name, new), bracket(name, after[name]),
            shown(name, new - old, "+"), relative(old, new),
        ])
    return aligned(rows)


def listing(metrics: dict) -> str:
    """One model's metrics, one line each."""
    rows = [["%", "value", "95 % interval"]]
    for name, metric in metrics.items():
        rows.append([label(name), shown(name, metric["value"]), bracket(name, metric)])
    return aligned(rows)


def comparison(names: Sequence[str], metrics: Sequence[dict], differences: Sequence[dict]) -> str:
    """Several models in one table: the first one's values, then value and difference to the first.

    Args:
        names: of the models.
        metrics: of each model.
        differences: of each but the first to the first, as `paired` returns them.
    """
    rows = [["%", names[0]]]
    for name in names[1:]:
        rows[0] += [name, f"- {names[0]}, 95 % interval"]
    for measure in metrics[0]:
        if measure.startswith(PER_KIND) or not all(measure in each for each in metrics):
            continue
        row = [label(measure)] + [shown(measure, metrics[0][measure]["value"])]
        for each, difference in zip(metrics[1:], differences):
            row.append(shown(measure, each[measure]["value"]))
            found = difference[measure]
            row.append(f"{shown(measure, found['value'], '+')} {bracket(measure, found, '+')}")
        rows.append(row)
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------------------------- results.json


def write_results(path: Path | str, before: tuple | None, after: tuple) -> None:
    """Write results.json, {"before": {"metrics", "records"}, "after": {...}}, atomically.

    Args:
        before, after: (metrics, records) as `evaluate.measure_world` returns them; before is None
            where nothing was measured. Every record becomes one line of the file.
    """
    parts = []
    for name, pair in (("before", before), ("after", after)):
        if pair is not None:
            metrics = json.dumps(pair[0], indent=1, ensure_ascii=False)
            records = ",\n".join(json.dumps(record, ensure_ascii=False) for record in pair[1])
            parts.append(f'"{name}": {{"metrics": {metrics},\n"records": [\n{records}\n]}}')
    write_atomic(path, "{" + ",\n".join(parts) + "}\n")


def read_results(path: Path | str) -> dict[str, tuple[dict, list[dict]]]:
    """What `write_results` wrote: {"before": (metrics, records), "after": (metrics, records)}.

    Raises:
        FileNotFoundError, ValueError: one sentence about what is wrong with the file.
    """
    content = read_json(Path(path))
    try:
        return {name: (part["metrics"], part["records"]) for name, part in content.items()}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a results.json of this program; measure again") from None
