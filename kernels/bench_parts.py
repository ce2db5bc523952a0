"""Run the parts of a benchmark, each in a process of its own, and make tables of their rows.

A part is a function of the sizes that yields rows; the first line of its docstring is the title of
its table. A part that fails or takes too long leaves its error and the rows it had.
"""

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, object]
Part = Callable[[object], Iterator[Row]]


def work(part: Part, sizes: object, folder: Path) -> None:
    """Run a part in its own process and folder, and write its rows as they come, then its error."""
    os.chdir(folder)
    with (folder / "rows.jsonl").open("w", buffering=1) as file:
        try:
            for row in part(sizes):
                file.write(json.dumps(row) + "\n")
        except Exception as error:
            traceback.print_exc()
            file.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")


def measure(part: Part, sizes: object, limit: float) -> Row:
    """Return a part's name, title, rows, seconds, and its error or None."""
    started, error = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as name:
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(part, sizes, Path(name)))
        process.start()
        process.join(max(limit, 1))
        if process.is_alive():
            process.kill()
            process.join()
            error = f"stopped after {limit:.0f} s"
        elif process.exitcode:
            error = f"the process ended with {process.exitcode}"
        log = Path(name) / "rows.jsonl"
        rows = []
        for line in log.read_text().splitlines() if log.exists() else ():
            with contextlib.suppress(ValueError):  # half a line of a process that was stopped
                rows.append(json.loads(line))
    if rows and "failed" in rows[-1]:
        error = rows.pop()["failed"]
    title = part.__doc__.partition("\n")[0]
    return {"part": part.__name__, "title": title, "rows": rows, "error": error,
            "seconds": round(time.perf_counter() - started, 1)}


def markdown(part: Row) -> str:
    """A part's heading, table and error."""
    lines = [f"## {part['part']}", "", f"{part['title']} {part['seconds']} s."]
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    if columns:
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in part["rows"]:
        lines.append(f"| {' | '.join(shown(row.get(column)) for column in columns)} |")
    if part["error"]:
        lines += ["", f"Failed: {part['error'].splitlines()[0]}"]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
