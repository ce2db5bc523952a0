"""How far annotators agree, and how fast they are: what `annotate.py --agreement FILE` prints.

Two annotators agree on a token of an answer if both corrections leave it or both change it. Cohen's
kappa, (p - e) / (1 - e), corrects the share p of such tokens for chance: e is the share if both
marked as many tokens, but at random. The row "all" counts every pair of annotators in both orders,
which makes it Scott's pi.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from annotation.diff import Units
from annotation.store import by_answer, differ, read_lines
from formats.rows import DataError
from segments import segment_mask


def kappa(marks: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """Return the share of tokens that two annotators agree on, and Cohen's kappa.

    Args:
        marks: for each token, whether the first and whether the second annotator marks it. Kappa is
            nan if both mark none, or both all.
    """
    share = sum(a == b for a, b in marks) / len(marks)
    first, second = (sum(column) / len(marks) for column in zip(*marks))
    chance = first * second + (1 - first) * (1 - second)
    return share, (share - chance) / (1 - chance) if chance < 1 else math.nan


def false_units(units: Units, line: dict) -> list[bool]:
    """Return for every token of the original answer whether it was changed; [] if skipped."""
    if line["status"] == "skipped":
        return []
    try:
        masks = segment_mask(units.ids(line["chosen"]), units.ids(line["rejected"]))
    except ValueError as error:
        raise DataError(f"answer {line['id']} about {line['image']}: {error}") from None
    return masks[1].tolist()[:-1]


def table(rows: Sequence[Sequence]) -> str:
    """Align columns, the first to the left, the others to the right."""
    cells = [list(map(str, row)) for row in rows]
    first, *rest = (max(map(len, column)) for column in zip(*cells))
    align = lambda row: [row[0].ljust(first), *map(str.rjust, row[1:], rest)]
    return "\n".join("  ".join(align(row)) for row in cells)


def people(lines: Sequence[dict], units: Units) -> str:
    """Return a table, one row per annotator: how many answers, what was done to them, how fast."""
    statuses = ("corrected", "accepted", "skipped")
    rows = [("annotator", "answers", *statuses, f"{units.name} changed", "median s")]
    for name in sorted({line["annotator"] for line in lines}):
        mine = [line for line in lines if line["annotator"] == name]
        flat = [mark for line in mine for mark in false_units(units, line)]
        shares = [sum(line["status"] == status for line in mine) / len(mine) for status in statuses]
        shares.append(sum(flat) / max(1, len(flat)))
        seconds = statistics.median(line["seconds"] for line in mine)
        rows.append((name, len(mine), *(f"{share:.1%}" for share in shares), f"{seconds:.0f}"))
    return table(rows)


def agreement(path: Path, units: Units) -> str:
    """Return the report on a file of corrections; a DataError names a bad line."""
    lines = read_lines(path, path.read_bytes())
    answers = by_answer(lines)
    decided = {line["id"]: line["annotator"] for line in lines if "adjudicated" in line}
    report = people([line for each in answers.values() for line in each.values()], units)
    pairs, listed = defaultdict(list), []
    for key, versions in answers.items():
        for one, two in combinations(sorted(versions), 2):
            marks = list(zip(*(false_units(units, versions[name]) for name in (one, two))))
            if marks:  # neither skipped it
                pairs[f"{one} - {two}"] += marks
                pairs["all, both ways"] += marks + [(b, a) for a, b in marks]
        if differ(versions):
            what = ", ".join(f"{name} {line['status']}" for name, line in sorted(versions.items()))
            what += f"; {decided[key]} decided" if key in decided else ""
            listed.append(f"  {key}  {next(iter(versions.values()))['image']}: {what}")
    if not pairs:
        return (f"{report}\n\nNo answer was corrected by two annotators; annotate.py --overlap 0.1 "
                "gives a tenth of the answers to two.")
    figures = [(names, len(marks), *kappa(marks)) for names, marks in sorted(pairs.items())]
    rows = [(names, n, f"{share:.1%}", "-" if math.isnan(value) else f"{value:.2f}")
            for names, n, share, value in figures]
    head = f"--adjudicate opens answers with different corrections: {len(listed)}"
    return "\n\n".join([report, table([("annotators", units.name, "agree", "kappa"), *rows]),
                        "\n".join([head, *listed])])
