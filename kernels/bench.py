"""What the loss head costs, against the usual ways and the matmul floor; one table per machine.

    python kernels/bench.py                          shapes of a 7B model on a GPU, small on a CPU
    python kernels/bench.py --frozen                 no gradient for the vocabulary matrix (LoRA)
    python kernels/bench.py --vocab 640 --width 512  any other shape
    python kernels/bench.py --step                   a whole DDPO step (bench_step.py)
    python kernels/bench.py --generate               generation (bench_generate.py)

Three jobs on the same R response tokens, of P pairs: log-probs without a gradient, log-probs with
gradients for given coefficients, and the whole DDPO loss with gradients. For each:

* ms: median of the runs after two unmeasured ones, forward and backward together.
* x floor: that time over the time of the bare matrix products (1 without a gradient; 3 with, 2 if
  the head is frozen), median of runs that take turns.
* MB: highest memory beside inputs and gradients (CUDA's allocator; the profiler's record on a CPU).
* off by: distance of dH (of log p in the first job) from the eager row's, relative to its norm. In
  half precision a percent is rounding; more means that a row did not do the job.

Peers that are not installed, or do not run on the machine, say so in their row. Liger's DPO loss
knows no segment weights: it does the same work for a different number.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, read at import

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels  # noqa: E402  (found through the line above when run as a script)
from kernels import reference  # noqa: E402

BETA = 0.5


class Inputs(NamedTuple):
    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (R,)
    coefficient: Tensor  # (R,) float32, what the log-probs' gradient is asked for
    segment_weight: Tensor  # (R,)
    group: Tensor  # (R,)
    reference: Tensor  # (2P,)


class Case(NamedTuple):
    job: str
    name: str
    run: Callable[[], Tensor]  # forward; returns what is compared, or a scalar to differentiate
    comparable: bool = True


def make_inputs(args) -> Inputs:
    torch.manual_seed(0)
    R, device, dtype = 2 * args.pairs * args.response, args.device, getattr(torch, args.dtype)
    hidden = torch.randn(R, args.width, device=device).to(dtype).requires_grad_()
    weight = torch.randn(args.vocab, args.width, device=device).mul_(args.width**-0.5).to(dtype)
    rows = torch.arange(R, device=device)
    return Inputs(
        hidden,
        weight.requires_grad_(not args.frozen),
        torch.randint(args.vocab, (R,), device=device),
        torch.randn(R, device=device) / R,
        torch.where(rows % 7 == 0, 5.0, 1.0),
        rows // args.response,
        torch.randn(2 * args.pairs, device=device) - args.vocab**0.1,
    )


# The cases -----------------------------------------------------------------------------------


def eager(hidden, weight, target):
    return reference.token_logp(hidden, weight, target)


def torch_linear_cross_entropy(x: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none", options=options)


def liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(x.weight, x.hidden, x.target)


def cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none")


def liger_dpo(x: Inputs) -> Tensor:
    """Chosen responses first, then the rejected, all of one length; no reference pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, average_log_prob=True)
    order = torch.arange(len(x.reference), device=x.hidden.device).view(-1, 2).T.flatten()
    hidden = x.hidden.view(len(order), -1, x.hidden.shape[1])[order]
    return loss(x.weight, hidden, x.target.view(len(order), -1)[order])[0]


def make_cases(x: Inputs) -> list[Case]:
    compiled = torch.compile(eager)
    compiled_ddpo = torch.compile(reference.ddpo_loss)
    pairs = (*x[:3], *x[4:], BETA)

    def gradient_of(logp: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: (logp().float() * x.coefficient).sum()

    def without_gradient(logp: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(logp)

    cases = [
        Case("log p", "eager", without_gradient(lambda: eager(*x[:3]))),
        Case("log p", "torch.compile", without_gradient(lambda: compiled(*x[:3]))),
        Case("log p", "ours A (forward)", without_gradient(lambda: kernels.token_logp(*x[:3]))),
        Case("log p, gradients", "eager", gradient_of(lambda: eager(*x[:3]))),
        Case("log p, gradients", "torch.compile", gradient_of(lambda: compiled(*x[:3]))),
    ]
    for name, peer in (
        ("F.linear_cross_entropy", torch_linear_cross_entropy),
        ("Liger", liger),
        ("cut-cross-entropy", cut_cross_entropy),
    ):
        cases.append(Case("log p, gradients", name, gradient_of(lambda peer=peer: peer(x))))
    for method, letter in (("chunks", "B"), ("slices", "C")):
        ours = gradient_of(lambda method=method: kernels.token_logp(*x[:3], method=method))
        cases.append(Case("log p, gradients", f"ours {letter} ({method})", ours))
    cases += [
        Case("DDPO loss", "eager", lambda: reference.ddpo_loss(*pairs)[0]),
        Case("DDPO loss", "torch.compile", lambda: compiled_ddpo(*pairs)[0]),
        Case("DDPO loss", "Liger DPO", lambda: liger_dpo(x), comparable=False),
    ]
    for method, letter in (("chunks", "B"), ("slices", "C")):
        ours = lambda method=method: kernels.ddpo_loss(*pairs, method=method)[0]  # noqa: E731
        cases.append(Case("DDPO loss", f"ours {letter} ({method})", ours))
    return cases


def floor_of(x: Inputs, gradients: bool) -> Callable[[], None]:
    """The matrix products that the job cannot do without, and nothing else."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    dz = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device).zero_()

    def run() -> None:
        torch.mm(hidden, weight.T, out=dz)
        if gradients:
            torch.mm(dz, weight)
        if gradients and x.weight.requires_grad:
            torch.mm(dz.T, hidden)

    return run


# Measuring -----------------------------------------------------------------------------------


def with_backward(case: Case, x: Inputs) -> Callable[[], Tensor]:
    """Runs the case; returns dH, or log p for a job without gradients."""

    def run() -> Tensor:
        x.hidden.grad = x.weight.grad = None
        result = case.run()
        if not result.requires_grad:
            return result
        result.backward()
        return x.hidden.grad

    return run


def time_beside(run: Callable, floor: Callable, repeats: int, on_gpu: bool) -> tuple[float, float]:
    """Median seconds, and median ratio to the floor's; the two take turns, so that a machine that
    is busy for a while slows both."""

    def seconds(function: Callable) -> float:
        start = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    pairs = [(seconds(run), seconds(floor)) for _ in range(repeats + 2)][2:]
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def peak_memory(run: Callable, x: Inputs, on_gpu: bool) -> float:
    """Highest bytes allocated during a run, less the gradients that it leaves behind."""
    x.hidden.grad = x.weight.grad = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_cpu_memory(run)
    grads = [tensor.grad for tensor in (x.hidden, x.weight) if tensor.grad is not None]
    return peak - sum(grad.nbytes for grad in grads)


def peak_cpu_memory(run: Callable) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


# The table -----------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name, cpu = platform.machine(), Path("/proc/cpuinfo")
    for line in cpu.read_text().splitlines() if cpu.exists() else ():
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


def header(args) -> str:
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    R = 2 * args.pairs * args.response
    head = "frozen head" if args.frozen else "trained head"
    return (
        f"{datetime.date.today()} | {device_name(args.device)} | {versions}\n"
        f"{args.pairs} pairs, R = {R} response tokens, D = {args.width}, V = {args.vocab}, "
        f"{args.dtype}, {head}, median of {args.repeats}"
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def measure(case: Case, x: Inputs, floor: Callable, expected: Tensor | None, args):
    """The case's row of the table, and its result."""
    on_gpu = args.device == "cuda"
    run = with_backward(case, x)
    result = run().float().clone()
    seconds, ratio = time_beside(run, floor, args.repeats, on_gpu)
    megabytes = peak_memory(run, x, on_gpu) / 1e6
    distance = "-"
    if expected is not None and case.comparable:
        distance = f"{((result - expected).norm() / expected.norm()).item():.1e}"
    return f"{1e3 * seconds:9.2f} {ratio:8.2f} {megabytes:9.1f} {distance:>8}", result


def table(args) -> None:
    x = make_inputs(args)
    floors, expected = {}, {}
    print(header(args))
    print(f"\n{'job':<17} {'by':<23} {'ms':>9} {'x floor':>8} {'MB':>9} {'off by':>8}")
    for case in make_cases(x):
        if case.job not in floors:
            floor = floors[case.job] = floor_of(x, gradients=case.job != "log p")
            seconds, ratio = time_beside(floor, floor, args.repeats, args.device == "cuda")
            print(f"{case.job:<17} {'matmul floor':<23} {1e3 * seconds:9.2f} {ratio:8.2f}")
        try:
            row, result = measure(case, x, floors[case.job], expected.get(case.job), args)
            expected.setdefault(case.job, result)
        except Exception as error:  # a peer that is absent or fails must not end the table
            if case.name.startswith("ours"):
                raise
            row = f"  not run: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
        print(f"{case.job:<17} {case.name:<23} {row}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--pairs", type=int, default=32 if gpu else 8)
    parser.add_argument("--response", type=int, default=100 if gpu else 40, help="tokens of each")
    parser.add_argument("--width", type=int, default=4096 if gpu else 256, help="D")
    parser.add_argument("--vocab", type=int, default=32064 if gpu else 8192, help="V")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if gpu else "float32")
    parser.add_argument("--frozen", action="store_true", help="no gradient for the head")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 5)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--step"]:
        from kernels import bench_step

        bench_step.main(argv[1:])
    elif argv[:1] == ["--generate"]:
        from kernels import bench_generate

        bench_generate.main(argv[1:])
    else:
        table(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
