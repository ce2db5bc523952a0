"""Compare the loss head with the usual ways and with the matmul floor.

Three jobs on the same R response tokens of P pairs: log-probs without a gradient, log-probs with
gradients for given coefficients, and the whole DDPO loss with gradients; with and without a
gradient for the vocabulary matrix, which LoRA leaves frozen. The columns are

* ms: median, forward and backward together.
* x floor: that time over the time of the bare matrix products (1 without a gradient; 3 with, 2 if
  the head is frozen), median of the turns' ratios.
* MB: highest memory beside inputs and gradients (CUDA's allocator; the profiler's record on a CPU).
* off by: distance of dH (of log p in the first job) from the eager row's, relative to its norm. In
  half precision one per cent is rounding; more means a wrong result.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kernels
from config import option
from kernels import reference
from kernels.bench_tools import GPU, Row, machine, ratio, table, take_turns

FORWARD, GRADIENTS, DDPO = "log p", "log p, gradients", "DDPO loss"  # the jobs
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass
class Options:
    pairs: int = option(32 if GPU else 8, "preference pairs (P)", least=1)
    response: int = option(100 if GPU else 40, "tokens of each response", least=1)
    width: int = option(4096 if GPU else 256, "of the hidden states (D)", least=1)
    vocab: int = option(32064 if GPU else 8192, "size of the vocabulary (V)", least=1)
    device: str = option("cuda" if GPU else "cpu", "where to run", choices=("cuda", "cpu"))
    repeats: int = option(20 if GPU else 5, "measured turns", least=1)

    @property
    def bounds(self) -> list[int]:
        """The row where each response begins, and R."""
        return list(range(0, (2 * self.pairs + 1) * self.response, self.response))


class Inputs(NamedTuple):
    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (R,)
    coefficient: Tensor  # (R,), the upstream gradient of the log-probs
    pairs: tuple  # segment_weight (R,), group (R,), reference (2P,), beta


def make_inputs(options: Options, frozen: bool) -> Inputs:
    torch.manual_seed(0)
    P, V, D, device = options.pairs, options.vocab, options.width, options.device
    R, dtype = 2 * P * options.response, DTYPES[device]
    hidden = torch.randn(R, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).mul_(D**-0.5).to(dtype)
    rows, target = torch.arange(R, device=device), torch.randint(V, (R,), device=device)
    scores = torch.randn(2 * P, device=device) - V**0.1
    pairs = torch.where(rows % 7 == 0, 5.0, 1.0), rows // options.response, scores, 0.5
    coefficient = torch.randn(R, device=device) / R
    return Inputs(hidden, weight.requires_grad_(not frozen), target, coefficient, pairs)


PEERS = {  # (hidden, weight, target) -> log-probs
    "F.linear_cross_entropy": lambda h, w, t: -F.linear_cross_entropy(
        h, w, t, reduction="none", options=torch.nn.LinearCrossEntropyOptions()),
    "Liger": lambda h, w, t: -import_module(
        "liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")(w, h, t),
    "cut-cross-entropy": lambda h, w, t: -import_module(
        "cut_cross_entropy").linear_cross_entropy(h, w, t, reduction="none"),
    "TRL (chunks)": lambda h, w, t: import_module(  # 8192 columns at a time, as its trainers do
        "trl.trainer.utils")._ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 8192, None, 1.0)[0],
}


def make_cases(bounds: list[int]) -> dict[str, dict[str, Callable]]:
    """Return {job: {name: function of the inputs}}; the trainer knows the bounds, too."""
    plain = lambda function: {"eager": function, "torch.compile": torch.compile(function)}
    ours = lambda function, **known: {
        f"ours {name}": partial(function, method=method, **known)
        for name, method in (("B (chunks)", "chunks"), ("C (slices)", "slices"))}
    return {
        FORWARD: plain(reference.token_logp) | {"ours A (forward)": kernels.token_logp},
        GRADIENTS: plain(reference.token_logp) | PEERS | ours(kernels.token_logp),
        DDPO: plain(reference.ddpo_loss) | ours(kernels.ddpo_loss, bounds=bounds),
    }


def make_floor(x: Inputs, gradients: bool) -> Callable[[], None]:
    """Return a function that computes only the matrix products that the job needs."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    dz = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        torch.mm(hidden, weight.T, out=dz)
        if gradients:
            torch.mm(dz, weight)
        if gradients and x.weight.requires_grad:
            torch.mm(dz.T, hidden)

    return run


def run_job(job: str, function: Callable, x: Inputs) -> Tensor:
    """Return dH, or log p for the job without gradients."""
    x.hidden.grad = x.weight.grad = None
    if job == FORWARD:
        with torch.no_grad():
            return function(*x[:3])
    if job == GRADIENTS:
        logp = function(*x[:3])
        logp.backward(x.coefficient.to(logp.dtype))
    else:
        function(*x[:3], *x.pairs)[0].backward()
    return x.hidden.grad


def peak_memory(run: Callable, x: Inputs) -> float:
    """Return the most bytes allocated during a run, less those of the gradients it leaves."""
    x.hidden.grad = x.weight.grad = None
    if x.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_cpu_memory(run)
    gradients = [tensor.grad for tensor in x[:2] if tensor.grad is not None]
    return peak - sum(gradient.nbytes for gradient in gradients)


def peak_cpu_memory(run: Callable) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def head_rows(options: Options) -> Iterator[Row]:
    """Yield the rows of both heads and all jobs."""
    for head in ("frozen", "trained"):
        x = make_inputs(options, head == "frozen")
        for job, functions in make_cases(options.bounds).items():
            yield from ({"head": head, **row} for row in job_rows(job, functions, x, options))


def job_rows(
    job: str, functions: dict[str, Callable], x: Inputs, options: Options
) -> Iterator[Row]:
    """Yield the floor's row and the others'; a function that is absent or fails gives its error."""
    floor, expected = make_floor(x, gradients=job != FORWARD), None
    for name, function in {"matmul floor": None, **functions}.items():
        run = partial(run_job, job, function, x) if function else floor
        row = {"job": job, "by": name}
        try:
            memory = {}
            if function:
                result = run().float().clone()
                expected = result if expected is None else expected
                memory = {"MB": peak_memory(run, x) / 1e6, "off by": distance(result, expected)}
            times = take_turns({name: run, "floor": floor}, options.repeats, options.device)
            slower = ratio(times[name], times["floor"])
            yield row | {"ms": 1e3 * median(times[name]), "x floor": slower} | memory
        except Exception as error:  # continue with the next row
            yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:80]}


def main(options: Options) -> None:
    print(machine(options.device, "torch", "triton", "liger-kernel", "cut-cross-entropy"))
    print(f"{options.pairs} pairs, R = {2 * options.pairs * options.response} response tokens, "
          f"D = {options.width}, V = {options.vocab}, {DTYPES[options.device]}, "
          f"median of {options.repeats}\n")
    rows = list(head_rows(options))
    print(table(rows))
    if failed := [row for row in rows if row["by"].startswith("ours") and "error" in row]:
        sys.exit(f"error: {failed[0]['by']}: {failed[0]['error']}")
