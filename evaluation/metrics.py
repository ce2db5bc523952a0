"""Measures with bootstrap intervals, tables of them, and results.json.

A *measure* is a list of terms (coefficient, numerators, denominators) with one number per item (a
scene, an image, a question) in either array. Its value is the sum over terms of

    coefficient * sum(numerators) / sum(denominators)

Rates, accuracy, F1 = 2 TP / (2 TP + FP + FN) and differences of rates all have this form. A
bootstrap resample is then a vector of weights on the items, and a measure in a thousand resamples
is two matrix products. The same resamples for two models that answered the same items give *paired*
differences, in which the difficulty that both models share cancels out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from formats.files import read_json, write_atomic

Terms = list[tuple[float, np.ndarray, np.ndarray]]
RESAMPLES = 1000
PER_KIND = "mmhal/kind/"  # measures that only results.json and the report list


def values(terms: Terms, weights: np.ndarray) -> np.ndarray:
    """Return (W,): a measure under each row of weights (W, items); nan where it divides by 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sum(c * (weights @ above) / (weights @ below) for c, above, below in terms)


def grouped(measures: dict[str, Terms], groups: Sequence | None) -> dict[str, Terms]:
    """Return the measures with the items of each group, such as one image, summed to one item.

    Items of a group are then resampled together: eight answers about one image are not eight
    independent observations. Groups keep the order of first appearance; None groups nothing.
    """
    if groups is None:
        return measures
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = np.array([number[group] for group in groups], dtype=int)
    total = lambda numbers: np.bincount(index, numbers, len(number))
    return {name: [(c, total(above), total(below)) for c, above, below in terms]
            for name, terms in measures.items()}


def with_intervals(measures: dict[str, Terms], seed: int = 0) -> dict:
    """Return {name: {"value", "low", "high"}} with 95 % percentile intervals.

    A measure that divides by zero, such as the precision of a model that never answers yes, is left
    out, and so are resamples in which it does. ValueError if there are no items.
    """
    items = len(next(iter(measures.values()))[0][1])
    if items == 0:
        raise ValueError("nothing to measure: there are no answers")
    # (RESAMPLES, items): how often each resample contains each item
    weights = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), RESAMPLES)
    found = {}
    for name, terms in measures.items():
        value = values(terms, np.ones((1, items)))[0]
        if np.isfinite(value):
            ends = np.nanpercentile(values(terms, weights), (2.5, 97.5))
            found[name] = dict(zip(("value", "low", "high"), map(float, (value, *ends))))
    return found


def paired(before: dict[str, Terms], after: dict[str, Terms], seed: int = 0) -> dict:
    """Return {name: {"value", "low", "high"}} of the differences after - before, item by item."""
    differences = {}
    for name in (name for name in before if name in after):
        both = zip(after[name], before[name], strict=True)  # in turn: equal terms cancel exactly
        differences[name] = [
            term for new, (c, above, below) in both for term in (new, (-c, above, below))]
    return with_intervals(differences, seed)


# ------------------------------------------------------------------------------------------- tables

INTERVAL = "95 % interval"
LESS_IS_BETTER = ("hallucination", "chair", "chair_s", "chair_i", "response", "mention", "hal",
                  "cog", "over_generalisation")
NEITHER = ("length", "yes_ratio")


def unit(name: str) -> str:
    """Return the unit of a measure: "words", "of 6" (MMHal's ratings), or "%"."""
    rating = name in ("score", "mmhal/score") or name.startswith(("score/", PER_KIND))
    return "words" if name == "length" else "of 6" if rating else "%"


def titled(name: str) -> str:
    """Return a measure's name, with its unit if that is not per cent."""
    return name if unit(name) == "%" else f"{name} ({unit(name)})"


def format_value(name: str, value: float, sign: str = "") -> str:
    """Format a value without its unit: two decimals for ratings, one for all others."""
    if unit(name) == "of 6":
        return f"{value:{sign}.2f}"
    return f"{value if unit(name) == 'words' else 100 * value:{sign}.1f}"


def format_metric(name: str, metric: dict, sign: str = "") -> tuple[str, str]:
    """Format {"value", "low", "high"} as a value and its interval, without unit."""
    value, low, high = (format_value(name, metric[key], sign) for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"


def table(before: dict | None, after: dict) -> str:
    """Format metrics, {name: {"value", "low", "high"}}: of one model, or of two and the change."""
    if before is None:
        return comparison({"value": after})
    rows = {}
    for name in shared(before, after):
        old, new = before[name]["value"], after[name]["value"]
        relative = f"{100 * (new - old) / old:+.0f} %" if old > 0 else ""
        rows[name] = (*format_metric(name, before[name]), *format_metric(name, after[name]),
                      format_value(name, new - old, "+"), relative)
    return aligned(("before", INTERVAL, "after", INTERVAL, "change", "relative"), rows)


def refuse_twins(names: Iterable[str]) -> None:
    """Raise a ValueError if two files of questions, and so their answers files, share a name."""
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{times} files of questions are called {name}; rename them, or give "
                             "each its own --output")


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Return {name: path}: the folder's own name, or the whole path where two share it.

    Raises:
        ValueError: a path, or a name made of one, comes twice.
    """
    whole = [Path(path) for path in paths]
    whole = [path if path.name and ".." not in path.parts else path.resolve() for path in whole]
    last = [[part for part in path.parts if part != "model"][-1:] for path in whole]
    named = {
        name[0] if name and last.count(name) == 1 else str(each).strip("/").replace("/", "_"): path
        for name, each, path in zip(last, whole, paths)
    }
    if len(named) < len(paths):
        raise ValueError(f"name every model once: {', '.join(paths)}")
    return named


def comparison(scores: dict[str, dict], differences: dict[str, dict] | None = None) -> str:
    """Format models side by side: values, the first one's intervals, and paired differences.

    Args:
        scores: {model: {measure: {"value", "low", "high"}}}, perhaps with a baseline "always_no".
        differences: {model: the same, to the first model}, of all models but the first.
    """
    first, *others = scores
    trivial = any("always_no" in each for each in scores[first].values())
    head, rows = [first, INTERVAL] + ['always "No"'] * trivial, {}
    for name in others:
        head += [name, f"- {first}, {INTERVAL}"]
    for measure in shared(every_measure(scores)):
        own = scores[first].get(measure, {})
        row = rows[measure] = list(format_metric(measure, own) if own else ("", ""))
        if trivial:
            row.append(format_value(measure, own["always_no"]) if "always_no" in own else "")
        for name in others:
            other, change = scores[name].get(measure), differences[name].get(measure)
            row.append(format_value(measure, other["value"]) if other else "")
            row.append(" ".join(format_metric(measure, change, "+")) if other and change else "")
    return aligned(head, rows)


def every_measure(scores: dict[str, dict]) -> dict[str, None]:
    """Return the measures of all models; one may be undefined for some (see `with_intervals`)."""
    return dict.fromkeys(measure for each in scores.values() for measure in each)


def colour(measure: str, change: dict | None) -> str:
    """Return "good" or "bad" if a difference is more than chance, else ""."""
    last = measure.split("/")[-1]
    if not change or last in NEITHER or change["low"] <= 0 <= change["high"]:
        return ""
    less_is_better = last in LESS_IS_BETTER or measure.startswith("hallucination/")
    return "good" if (change["value"] < 0) == less_is_better else "bad"


def columns(metrics: dict[str, dict]) -> str:
    """Format {name: metrics} of several models or baselines side by side, without intervals."""
    names = shared(*metrics.values())
    rows = {name: [format_value(name, each[name]["value"]) for each in metrics.values()]
            for name in names}
    return aligned(list(metrics), rows)


def shared(first: dict, *others: dict) -> list[str]:
    """Return the measures that all have, without those that are not printed."""
    return [name for name in first
            if all(name in other for other in others) and not name.startswith(PER_KIND)]


def aligned(head: Sequence[str], cells: dict[str, Sequence[str]]) -> str:
    """Format {measure: cells} below a head; columns are flush right, the measures flush left."""
    rows = [("%", *head), *((titled(name), *row) for name, row in cells.items())]
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    lines = ("  ".join([name.ljust(first), *map(str.rjust, row, widths)]) for name, *row in rows)
    return "\n".join(map(str.rstrip, lines))


# ------------------------------------------------------------------------------------- results.json


def write_results(path: Path | str, results: dict[str, tuple[dict, list[dict]]]) -> None:
    """Write results.json, {name: {"metrics", "records"}}, a line per record.

    Args:
        results: (metrics, records) of "after", and, as far as they were measured, of "before" and
            of the blind baselines.
    """
    parts = []
    for name, (metrics, records) in results.items():
        numbers = json.dumps(metrics, indent=1, ensure_ascii=False)
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        parts.append(f'"{name}": {{"metrics": {numbers},\n"records": [\n{lines}\n]}}')
    write_atomic(path, "{" + ",\n".join(parts) + "}\n")


def read_results(path: Path | str) -> dict[str, tuple[dict, list[dict]]]:
    """Read results.json as {name: (metrics, records)}, see `write_results`.

    FileNotFoundError if it is missing, ValueError if `write_results` did not write it.
    """
    content = read_json(Path(path))
    try:
        return {name: (part["metrics"], part["records"]) for name, part in content.items()}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a results.json of this program; measure again") from None
