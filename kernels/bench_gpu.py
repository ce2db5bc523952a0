"""Measure all that needs a GPU in one command: correctness, loss head, training, decoding.

The parts run one after another, each in its own process and folder, for at most eight minutes in
all. A part is a function of the sizes that yields rows; the first line of its docstring is the
title of its table. If one fails or takes too long, its error and the rows so far are reported.

The random model has the shape of LLaVA-1.5 7B. Shares of time come from steps that wait for the
device after each part; all other figures from steps that do not.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ddpo
import ppo
import recipes
import rollouts
import train
from algorithm import Data, Start
from config import Run, option
from data import Example, Response
from evaluation import read_results
from formats.files import write_atomic
from generation import generate
from kernels import bench_head, fused
from kernels.bench_tools import Row, machine, now, seconds, start_process, table
from loop import Loop
from model import LLaVA, LLaVAConfig
from vision import ImageSettings

LIMIT = 480  # seconds in all
FULL = 139 * 2**30  # bytes of memory that a step without LoRA takes at 7B
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


@dataclass
class Options:
    out: str = option("gpu.json", "JSON file; the tables go beside it as .md")


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure on a GPU; the tests use smaller ones on a CPU."""

    device: str = "cuda"
    model: LLaVAConfig = field(default_factory=LLaVAConfig)
    checked: tuple[int, ...] = (4, 25, 512, 3001)  # pairs, response, width, vocabulary
    head: tuple[int, ...] = (32, 100, 4096, 32064)  # the same
    pairs: int = 8  # of a training step
    question: int = 40  # tokens
    response: int = 100
    rank: int = 64
    batches: tuple[int, ...] = (1, 16)  # completions decoded at a time
    new_tokens: int = 64
    compiled: tuple[bool, ...] = (False, True)
    repeats: int = 5
    matrix: int = 8192  # width of the products that measure the peak
    world: tuple[str, ...] = ()  # more options of the built-in run


Part = Callable[[Sizes], Iterator[Row]]

# ------------------------------------------------------------------------------------------ parts


def check_kernels(sizes: Sizes) -> Iterator[Row]:
    """Relative errors against float32, beside those of plain torch in the same dtype."""
    options = head_options(sizes, sizes.checked)
    x = bench_head.make_inputs(options, frozen=False)
    exact = bench_head.Inputs(*(each.detach().float().requires_grad_() for each in x[:2]), *x[2:])
    for job, functions in bench_head.make_cases(options.bounds).items():
        plain = functions["eager"]
        expected = bench_head.run_job(job, plain, exact).clone()
        budget = bench_head.distance(bench_head.run_job(job, plain, x), expected)
        for name, function in functions.items():
            if name.startswith("ours"):
                error = bench_head.distance(bench_head.run_job(job, function, x), expected)
                yield checked(f"{job}: {name}", error, budget)
    a, b = x.hidden.detach(), x.weight.detach()[: len(x.hidden)]
    total = torch.ones(a.shape[1], a.shape[1], device=a.device)
    expected = total + a.T.float() @ b.float()
    fused.add_product_(total, a.T, b, first=False)
    yield checked("addmm into float32", bench_head.distance(total, expected), 1e-5)
    values, group = torch.randn(len(x.target), device=a.device), x.pairs[1]
    edges = torch.searchsorted(group, torch.arange(group[-1] + 2, device=a.device))
    expected = torch.zeros(len(edges) - 1, device=a.device).index_add(0, group, values)
    error = bench_head.distance(fused.segment_sum(values, edges), expected)
    yield checked("segment_reduce", error, 1e-5)


def checked(what: str, error: float, budget: float) -> Row:
    return {"what": what, "error": error, "plain or limit": budget,
            "right": error <= 1.5 * budget + 1e-5}


def loss_head(sizes: Sizes) -> Iterator[Row]:
    """Loss head beside the matrix products that it cannot do without, and beside peers."""
    yield from bench_head.head_rows(head_options(sizes, sizes.head))


def head_options(sizes: Sizes, shape: tuple[int, ...]) -> bench_head.Options:
    return bench_head.Options(*shape, sizes.device, sizes.repeats)


def world_run(sizes: Sizes) -> Iterator[Row]:
    """A whole DDPO run of the built-in world in bfloat16, with all that comes before it."""
    command = ("--algo", "ddpo", "--dtype", "bfloat16", "--device", sizes.device, "--out", "ddpo")
    started = time.perf_counter()
    if train.main([*command, *sizes.world]):
        raise RuntimeError("train.py failed; its error is above")
    took = time.perf_counter() - started
    results = read_results("ddpo/results.json")
    before, after = results["before"][0], results["after"][0]
    for name in ("hallucination/any", "coverage"):
        yield {"measure": name, "before": before[name]["value"], "after": after[name]["value"]}
    yield {"measure": "seconds", "after": took}


def lora_steps(sizes: Sizes) -> Iterator[Row]:
    """DDPO steps with LoRA."""
    yield from steps(sizes, sizes.rank)


def full_steps(sizes: Sizes) -> Iterator[Row]:
    """DDPO steps that train decoder, projector and head."""
    if sizes.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < FULL:
        raise RuntimeError(f"needs a GPU with {FULL / 2**30:.0f} GiB")
    yield from steps(sizes, 0)


def steps(sizes: Sizes, rank: int) -> Iterator[Row]:
    start, cuda = make_start(sizes, rank), sizes.device == "cuda"
    config = ddpo.DDPOConfig(
        learning_rate=1e-5, batch_size=sizes.pairs, micro_batch=sizes.pairs, steps=10**6)
    data = Data(make_examples(sizes, sizes.pairs))
    loop = Loop(ddpo.DDPO(start, config, data), start, data)
    a = torch.randn(sizes.matrix, sizes.matrix, device=sizes.device, dtype=torch.bfloat16)
    useful, peak = step_flops(loop), rate(2 * len(a) ** 3, partial(torch.mm, a, a), sizes.device)
    for recompute in (True, False):  # what needs less memory first
        start.model.decoder.gradient_checkpointing = recompute
        loop.one_step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        took = median(seconds(loop.one_step, sizes.device) for _ in range(sizes.repeats))
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        row = {"recomputing": recompute, "seconds": took, "pairs/s": sizes.pairs / took,
               "TFLOP/s": useful / took / 1e12, "MFU %": 100 * useful / took / peak, "GB": memory}
        yield row | {f"{part} %": share for part, share in time_shares(loop, sizes.device).items()}


def step_flops(loop: Loop) -> int:
    """Count the FLOPs of a step without recomputing: one pair's times the pairs, equally long."""
    config = loop.algorithm.config
    loop.algorithm.config = replace(config, micro_batch=1)
    pair = loop.algorithm.batches(0)[0].to(loop.start.device)
    loop.algorithm.config = config
    with FlopCounterMode(display=False) as counter, loop.start.autocast():
        loop.algorithm.loss(pair)[0].backward()
    return counter.get_total_flops() * config.batch_size


def time_shares(loop: Loop, device: str) -> dict[str, float]:
    """Return the parts' shares of a step in per cent; each part waits for the device."""
    marks, model = [], loop.start.model
    mark = lambda *_: marks.append(now(device))
    hooks = [model.register_forward_pre_hook(mark), model.head.register_forward_pre_hook(mark),
             model.head.register_forward_hook(mark),
             loop.optimizers[0].register_step_pre_hook(mark)]
    mark()
    loop.one_step()
    mark()
    for hook in hooks:
        hook.remove()
    names = ("batch", "decoder", "head", "backward", "update")
    return {name: 100 * (last - first) / (marks[-1] - marks[0])
            for name, (first, last) in zip(names, pairwise(marks), strict=True)}


def decoding(sizes: Sizes) -> Iterator[Row]:
    """Greedy decoding: tokens per second, and the share of the memory's bandwidth that it uses."""
    model, text = make_model(sizes, torch.bfloat16), sizes.model.text
    read = sum(w.nbytes for part in (model.decoder.layers, model.head) for w in part.parameters())
    per_token = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # bytes
    a = torch.zeros(sizes.matrix, 16 * sizes.matrix, device=sizes.device, dtype=torch.bfloat16)
    bandwidth = rate(2 * a.nbytes, partial(torch.empty_like(a).copy_, a), sizes.device)
    for batch in sizes.batches:
        examples = make_examples(sizes, batch)
        images = torch.stack([example.image for example in examples]).to(model.head.weight)
        prompts = [torch.tensor(example.prompt, device=sizes.device) for example in examples]
        length = len(prompts[0]) + sizes.new_tokens // 2
        for compiled in sizes.compiled:
            run = partial(
                generate, model, images, prompts, sizes.new_tokens, compiled=compiled)
            first = seconds(run, sizes.device)
            took = median(token_seconds(run, sizes.device) for _ in range(sizes.repeats))
            used = (read + batch * length * per_token) / took / bandwidth
            yield {"completions": batch, "compiled": compiled, "tokens/s": batch / took,
                   "bandwidth %": 100 * used, "first run, s": first}


def token_seconds(run: Callable, device: str) -> float:
    """Return the mean seconds from one token to the next, without waits for the device between."""
    first, tokens = [], []

    def mark(new: Tensor) -> None:
        tokens.append(new)
        if not first:
            first.append(now(device))

    run(on_token=mark)
    return (now(device) - first[0]) / (len(tokens) - 1)


def ppo_rollout(sizes: Sizes) -> Iterator[Row]:
    """Completions of PPO's policy, four to a prompt, with LoRA."""
    start = make_start(sizes, sizes.rank)
    count = max(sizes.batches)
    config = ppo.PPOConfig(samples=4, max_new_tokens=sizes.new_tokens, generate_batch=count)
    policy = rollouts.AdaptedModel(start.model, "default")
    run = partial(rollouts.sample, policy, make_examples(sizes, count), config, 0, 0)
    first = seconds(run, sizes.device)
    took = seconds(run, sizes.device)
    tokens = count * config.samples * sizes.new_tokens
    yield {"prompts": count, "seconds": took, "tokens/s": tokens / took, "first run, s": first}


PARTS = {  # and their limits in seconds
    check_kernels: 30, loss_head: 70, world_run: 90, lora_steps: 60, full_steps: 70, decoding: 100,
    ppo_rollout: 100,
}

# ----------------------------------------------------------------------------- tools of the parts


def make_model(sizes: Sizes, dtype: torch.dtype) -> LLaVA:
    """Make a random model that never ends an answer."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = LLaVA(replace(sizes.model, eos_token=-1)).to(dtype)
    torch.nn.init.normal_(model.decoder.embed_tokens.weight)  # zeros would make RMSNorm's slope 300
    return model


def make_start(sizes: Sizes, rank: int) -> Start:
    """Make a `Start` with a random model, as `recipes` does from a folder."""
    run = Run(lora=rank, dtype="bfloat16", device=sizes.device)
    model = make_model(sizes, torch.bfloat16 if rank else torch.float32)
    start = Start(run, model, None, ImageSettings(sizes.model.vision.image_size), Path("."))
    recipes.select_weights(start, ddpo.DDPO)
    return start


def make_examples(sizes: Sizes, count: int) -> list[Example]:
    """Make pairs of random image features and tokens."""
    torch.manual_seed(0)
    config, examples = sizes.model, []
    draw = lambda length: torch.randint(3, config.image_token, (length,)).tolist()
    weight = [5.0 if i % 7 == 0 else 1.0 for i in range(sizes.response)]
    for i in range(count):
        image = torch.randn(config.vision.patches, config.vision.hidden_size).bfloat16()
        prompt = [1, *[config.image_token] * len(image), *draw(sizes.question)]
        responses = [Response(draw(sizes.response), weight) for _ in range(2)]
        examples.append(Example(f"pair {i}", image, prompt, responses))
    return examples


def rate(amount: float, run: Callable, device: str) -> float:
    """Divide an amount of work by the seconds that it takes, the median of ten runs."""
    return amount / median(seconds(run, device) for _ in range(10))


# ------------------------------------------------------------------------- running all of them


def work(link: Connection, part: Part, sizes: Sizes, folder: str) -> None:
    """Run a part in this process; send its rows as they come, then its error."""
    os.chdir(folder)
    try:
        for row in part(sizes):
            link.send(row)
    except Exception as error:
        traceback.print_exc()
        link.send(f"{type(error).__name__}: {error}")


def measure(part: Part, sizes: Sizes, limit: float) -> Row:
    """Return a part's name, title, rows, seconds, and its error or None."""
    started, found, error = time.perf_counter(), [], None
    with tempfile.TemporaryDirectory() as folder:
        process, link = start_process(work, part, sizes, folder)
        try:
            while link.poll(max(0, started + limit - time.perf_counter())):
                found.append(link.recv())
            process.kill()
            error = f"stopped after {limit:.0f} s"
        except (EOFError, OSError):  # it has ended, perhaps in the middle of a row
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


def main(options: Options, sizes: Sizes = Sizes()) -> None:
    out = Path(options.out)
    if sizes.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --gpu measures an NVIDIA GPU, and torch finds none on this machine")
    started, found = time.perf_counter(), []
    name = machine(sizes.device, *PACKAGES)
    print(f"# {name}\n", flush=True)
    for part, limit in PARTS.items():
        left = LIMIT - (time.perf_counter() - started)
        found.append(measure(part, sizes, min(limit, left)))
        print(markdown(found[-1]), flush=True)
        date, device, versions = name.split(" | ")
        write_atomic(out, {"date": date, "device": device, "versions": versions, "parts": found})
        write_atomic(out.with_suffix(".md"), f"# {name}\n\n" + "\n".join(map(markdown, found)))
