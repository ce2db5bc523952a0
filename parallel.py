"""Several processes, started by torchrun: their shares of the work, and how they end.

Every process gets equally many micro-batches of a global batch (`shares`), as all take part in the
same collectives. A micro-batch's loss is weighted by its share of all processes' tokens or pairs
(`total`), and gradients are summed (sharding.py): loss, gradient norm, metrics and updates do not
depend on the number of processes, except for rounding. `gather` collects all other results that are
computed in parts. Only the first process writes files (`once`) and prints.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

PATIENCE = timedelta(hours=3)  # the longest that others wait while the first process works alone
GRACE = 5  # seconds between another process's failure and the end of this one

_joined: dict = {}  # what `join` sets up: mesh, dtype of products, store, watching thread


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if _joined else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _joined else 1


def mesh() -> DeviceMesh:
    return _joined["mesh"]


def product_dtype() -> torch.dtype | None:
    """Return the dtype of matrix products, or None if it is that of the weights."""
    return _joined["products"]


# -------------------------------------------------------------------------------- beginning and end


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def mute() -> None:
    """Let only the first process of torchrun print."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")


def join(device: str, bfloat16: Callable[[str], bool]) -> None:
    """Join the other processes of torchrun; without torchrun, do nothing.

    Args:
        device: "cpu"; or "auto" or "cuda": a GPU for each process, where there are GPUs.
        bfloat16: tells whether a type of device computes products in bfloat16.
    """
    if not launched() or _joined:
        return
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if device not in ("auto", kind):
        raise ValueError(f"--device {device}: torchrun gives each process its own {kind} device")
    if kind == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes for {gpus} GPUs: use --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, mine, count = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=mine, world_size=count, timeout=PATIENCE)
    done = threading.Event()
    thread = threading.Thread(target=watch, args=(store.clone(), done), daemon=True)
    _joined.update(mesh=init_device_mesh(kind, (count,)), store=store, done=done, thread=thread,
                   products=torch.bfloat16 if bfloat16(kind) else None)
    thread.start()


def leave() -> None:
    """Wait for the other processes, and end the group."""
    if _joined:
        dist.barrier()
        _joined["done"].set()
        _joined["thread"].join()
        dist.destroy_process_group()
        _joined.clear()


def watch(store: dist.Store, done: threading.Event) -> None:
    """End this process soon after another one fails, even if it is not waiting for that one."""
    with contextlib.suppress(RuntimeError):  # the store is gone, and torchrun with it
        while not store.check(["failed"]):
            if done.wait(2):
                return
    if not done.wait(GRACE):
        os._exit(1)


def fail(message: str, code: int) -> int:
    """Report a failure once for all processes, and end this one without waiting for the others."""
    if not _joined:
        print(message, file=sys.stderr)
        return code
    with contextlib.suppress(RuntimeError):
        if _joined["store"].add("failed", 1) == 1:
            print(message, file=sys.__stderr__, flush=True)
    os._exit(code)


def lost(error: Exception) -> bool:
    """Return whether an error means that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


# ------------------------------------------------------------------------------- shares of the work


def shares(rows: Sequence, size: int) -> list[tuple[Sequence, bool]]:
    """Cut rows into parts of at most `size`, and return this process's, equally many on each.

    A part that counts is (rows, True). A process that would lack rows gets (some row, False): it
    computes that part, since the others wait in the same collectives, and discards the result.
    """
    if world() == 1:
        return [(rows[i : i + size], True) for i in range(0, len(rows), size)]
    count = world() * math.ceil(len(rows) / (size * world()))
    edges = [len(rows) * i // max(count, 1) for i in range(count + 1)]
    parts = [rows[first:last] for first, last in pairwise(edges)][rank() :: world()]
    return [(part, True) if part else (rows[:1], False) for part in parts]


def gather(results: list) -> list:
    """Return all parts' results in order, on every process, given those of its own `shares`."""
    if world() == 1:
        return results
    found: list = [None] * world()
    dist.all_gather_object(found, results)
    whole = [None] * sum(map(len, found))
    for each, theirs in enumerate(found):
        whole[each :: world()] = theirs
    return whole


def in_parts(
    function: Callable[[Sequence], object], rows: Sequence, size: int, description: str = ""
) -> list:
    """Return a function's results for parts of at most `size` rows, in order, on every process.

    Each process computes its share. `description` labels a progress bar; "" shows none.
    """
    bar = tqdm(shares(rows, size), description, disable=None if description else True, leave=False)
    found = [(function(part), counts) for part, counts in bar]
    return [result for result, counts in gather(found) if counts]


def by_length(
    function: Callable[[Sequence], Tensor], rows: Sequence, size: int, length: Callable,
    entries: Callable,
) -> Tensor:
    """Return a function's results for rows, computed in parts of similar length to save padding.

    Args:
        function: rows -> (..., E), the entries of each row after those of the row before.
        length, entries: return a row's number of slots, and of its entries in E.

    Returns:
        (..., E) in the order of the rows, whatever order they were computed in.
    """
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    found = torch.cat(in_parts(function, [rows[i] for i in order], size), dim=-1)
    pieces = zip(order, found.split([entries(rows[i]) for i in order], dim=-1))
    return torch.cat([piece for _, piece in sorted(pieces, key=itemgetter(0))], dim=-1)


def once(function: Callable):
    """Call a function on the first process alone, and return its result on all."""
    if world() == 1:
        return function()
    box = [function() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Iterable[float]) -> list[float]:
    """Return sums over the processes, in float64."""
    if world() == 1:
        return list(map(float, values))
    numbers = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(numbers)
    return numbers.tolist()


def rows_of(length: int) -> slice:
    """Return this process's share of `length` rows, cut as DTensor cuts a dimension."""
    step = math.ceil(length / world())
    return slice(min(step * rank(), length), min(step * (rank() + 1), length))


class Draws:
    """Random numbers for some rows of a batch, the same whichever process decodes a row."""

    def __init__(self, generator: torch.Generator, batch: int, rows: slice):
        self.generator, self.batch, self.rows, self.steps = generator, batch, rows, 0

    def __call__(self, samples: int) -> Tensor:
        """Return (rows, samples) numbers in [0, 1)."""
        self.steps += 1
        shape, device = (self.batch, samples), self.generator.device
        return torch.rand(shape, generator=self.generator, device=device)[self.rows]
