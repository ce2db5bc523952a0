"""Tools of the benchmarks: the machine's name, timing in turns, tables, a random model."""

import datetime
import importlib.metadata
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import torch

from formats import checkpoint
from formats import tokenizer as tokenizers
from model import LLaVA, LLaVAConfig, TextConfig, init_weights
from vision import ImageSettings, VisionConfig
from world import pretraining

GPU = torch.cuda.is_available()
WARM_UP = 2  # turns that are not measured
Row = dict[str, object]  # of a table: column -> value


def machine(device: str, *packages: str) -> str:
    """Return the date, the device and the versions of packages as one line."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        models = re.findall(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
        name = f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{datetime.date.today()} | {name} | {versions}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def now(device: str) -> float:
    """Wait until the device has done all work so far, and return the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object], device: str) -> float:
    """Time a call, including the work that it leaves to the device."""
    started = time.perf_counter()
    function()
    return now(device) - started


def take_turns(runs: Mapping[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each run, by turn. In turns, a busy machine slows all runs alike."""
    turns = [[seconds(run, device) for run in runs.values()] for _ in range(WARM_UP + repeats)]
    return dict(zip(runs, map(list, zip(*turns[WARM_UP:]))))


def ratio(times: list[float] | None, others: list[float] | None) -> float | None:
    """Return the median of the turns' ratios, or None where one of the two did not run."""
    return median(a / b for a, b in zip(times, others)) if times and others else None


def start_process(function: Callable, *arguments) -> tuple[BaseProcess, Connection]:
    """Start `function(link, *arguments)` in a fresh process; the link ends with it."""
    spawn = multiprocessing.get_context("spawn")
    link, other_end = spawn.Pipe()
    process = spawn.Process(target=function, args=(other_end, *arguments), daemon=True)
    process.start()
    other_end.close()
    return process, link


def table(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table, with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def save_random_llava(
    folder: Path, vocab: int, width: int, layers: int, tower: VisionConfig
) -> Path:
    """Write a random LLaVA in the llava-hf layout below `folder` and return its path.

    `vocab` counts the image and padding tokens; the decoder's width is a multiple of 64.
    """
    path = folder / "tokenizer.model"
    tokenizers.train_tokenizer(pretraining.world_texts(100), path, vocab - 2)
    tokenizer = tokenizers.Tokenizer(path, vocab - 2, vocab - 1)
    text = TextConfig(vocab, width, width * 43 // 16, layers, width // 64, width // 64, 1024)
    model = LLaVA(LLaVAConfig(tower, text, vocab - 2, vocab - 1, tokenizer.eos_token))
    init_weights(model, 0)
    settings = ImageSettings(size=tower.image_size)
    checkpoint.save_llava(model, tokenizer, settings, folder / "model")
    return folder / "model"
