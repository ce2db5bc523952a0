"""Run the parts of a benchmark, each in a process and a folder of its own.

A part is a function of the sizes that yields rows; the first line of its docstring is the title of
its table. A part that fails or takes too long leaves its error and the rows it had.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from kernels.bench_tools import Row, start_process, table

Part = Callable[[object], Iterator[Row]]


def work(link: Connection, part: Part, sizes: object, folder: str) -> None:
    """Run a part in this process; send its rows as they come, then its error."""
    os.chdir(folder)
    try:
        for row in part(sizes):
            link.send(row)
    except Exception as error:
        traceback.print_exc()
        link.send(f"{type(error).__name__}: {error}")


def measure(part: Part, sizes: object, limit: float) -> Row:
    """Return a part's name, title, rows, seconds, and its error or None."""
    started, found, error = time.perf_counter(), [], None
    with tempfile.TemporaryDirectory() as folder:
        process, link = start_process(work, part, sizes, folder)
        try:
            while link.poll(max(0, started + limit - time.perf_counter())):
                found.append(link.recv())
            process.kill()
            error = f"stopped after {limit:.0f} s"
        except EOFError:
            pass
        process.join()
    if found and isinstance(found[-1], str):
        error = found.pop()
    elif process.exitcode:
        error = error or f"the process ended with {process.exitcode}"
    return {"part": part.__name__, "title": part.__doc__.partition("\n")[0], "rows": found,
            "error": error, "seconds": round(time.perf_counter() - started, 1)}


def markdown(part: Row) -> str:
    """Return a part's heading, table and error."""
    paragraphs = [f"## {part['part']}", f"{part['title']} {part['seconds']} s."]
    if part["rows"]:
        paragraphs.append(table(part["rows"]))
    if part["error"]:
        paragraphs.append(f"Failed: {part['error'].splitlines()[0]}")
    return "\n\n".join(paragraphs) + "\n"
