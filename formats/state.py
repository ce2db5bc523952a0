"""Resume states: all that an interrupted run needs, in one folder without pickled code.

    checkpoint-<step>/
      state.json                           numbers, strings, lists; a tensor's name in its place
      state.safetensors                    those tensors
      weights-00001-of-00003.safetensors   the rows of sharded tensors that process 1 of 3 held

Any number of processes can resume: each reads the rows that it needs, whichever files hold them.
"""

import contextlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import parallel
import sharding
from formats.files import atomic_folder, full_disk, open_file, read_json, sync

TENSOR = "tensor in state.safetensors"  # key of the object that stands for one in state.json


def save_state(folder: Path | str, state: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Write a resume state as one folder, complete or absent; all processes together.

    Args:
        folder: `checkpoint-<step>` inside the run's folder.
        state: nested dicts (with strings as keys) and lists of tensors, numbers, strings and None,
            the same on every process.
        weights: large tensors by name, of which every process may hold some rows.

    Raises:
        ValueError: the state holds a value that only unpickling code could restore.
    """
    tensors: dict[str, Tensor] = {}
    plain = take_tensors(state, "state", tensors)
    mine = {name: sharding.local(weight).detach().cpu().contiguous()
            for name, weight in (weights or {}).items()
            if sharding.is_sharded(weight) or parallel.rank() == 0}
    part = f"weights-{parallel.rank() + 1:05}-of-{parallel.world():05}.safetensors"
    with contextlib.ExitStack() as stack:  # renames the folder at the end, when all have written
        out = parallel.once(lambda: stack.enter_context(atomic_folder(Path(folder))))
        with full_disk(out / part):
            save_file({name: rows for name, rows in mine.items() if rows.numel()}, out / part)
        sync(out / part)
        parallel.total([0])
        if parallel.rank() == 0:
            save_file(tensors, out / "state.safetensors")
            (out / "state.json").write_text(json.dumps({"files": parallel.world(), "state": plain}))
    parallel.total([0])


def take_tensors(value: object, where: str, tensors: dict[str, Tensor]) -> object:
    """Return a value for JSON, its tensors moved to `tensors`; ValueError if that is impossible."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: take_tensors(item, f"{where}[{key!r}]", tensors)
                for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [take_tensors(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous()
        return {TENSOR: where}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; only tensors and plain values")


def put_tensors(value: object, tensors: dict[str, Tensor]) -> object:
    """Undo `take_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: put_tensors(item, tensors) for key, item in value.items()}
    return [put_tensors(item, tensors) for item in value] if isinstance(value, list) else value


class StoredRows:
    """A tensor whose rows lie in the files of several processes, one after another."""

    def __init__(self):
        self.parts: list[Tensor] = []

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(map(len, self.parts)), *first[1:]) if first else ()

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows, or all."""
        if not self.shape:
            return self.parts[0]
        first, found = 0, []
        start, stop, _ = rows.indices(self.shape[0])
        for part in self.parts:
            inside = slice(max(start - first, 0), max(stop - first, 0))
            found.append(part[inside])
            first += len(part)
        return torch.cat(found)


def load_state(folder: Path | str) -> tuple[dict, dict[str, StoredRows]]:
    """Return what `save_state` wrote: the state on the CPU, and the weights to be read in part.

    Raises:
        ValueError: the state is missing, or its files are broken.
    """
    folder = Path(folder)
    weights: dict[str, StoredRows] = {}
    try:
        saved = read_json(folder / "state.json")
        state = put_tensors(saved["state"], open_file(folder / "state.safetensors")[0])
        for i in range(saved["files"]):
            file = folder / f"weights-{i + 1:05}-of-{saved['files']:05}.safetensors"
            for name, part in open_file(file)[0].items():
                weights.setdefault(name, StoredRows()).parts.append(part)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{folder}: cannot be resumed from ({error}); use an earlier one") from None
    return state, weights


def latest_state(run: Path | str) -> Path | None:
    """Return the complete checkpoint with the highest step in a run's folder, or None."""
    found = [p for p in Path(run).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
