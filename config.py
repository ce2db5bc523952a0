"""Hyperparameters, each declared once in a dataclass, and the command line made from them.

    @dataclass
    class Config(Training):
        beta: float = option(0.5, "strength of the tie to the reference (RLHF-V, section 4.1)")

gives `--beta`, its type, its default and its line in `--help`. Booleans become `--x / --no-x`.
"""

import argparse
import math
import os
import re
import signal
import sys
from dataclasses import dataclass, field, fields
from glob import glob
from pathlib import Path
from types import UnionType
from typing import ClassVar, get_args, get_type_hints


VERSION = "0.2"
TRANSIENT = {  # options that do not change a result
    "resume", "overwrite", "dry_run", "gpus", "save_every", "log_every", "tensorboard"}
# May differ when a run resumes: they change rounding, and the reward model's centring term.
MEMORY = {"micro_batch", "gradient_checkpointing"}
# Options of the built-in feedback, without effect on one's own data.
OF_WORLD = {"corrections", "overlook", "noise", "rankings", "prompts"}


def option(default, help: str, choices: tuple | None = None, least: float = 0):
    """Return a dataclass field that is also a command-line option; a number is at least `least`."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


def number(kind: type, least: float):
    """Return a parser of numbers for argparse: finite, and at least `least`."""
    def read(text: str):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"should be at least {least:g}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse: "invalid int value"
    return read


@dataclass
class Training:
    """Optimisation; each algorithm sets its own defaults."""

    learning_rate: float | None = option(
        None, "peak learning rate; default: chosen by model size and --lora, and printed")
    batch_size: int = option(32, "rows per optimizer step", least=1)
    micro_batch: int = option(
        32, "rows per forward pass; smaller needs less memory, same result", least=1)
    epochs: int = option(3, "passes over the data")
    steps: int = option(0, "optimizer steps; 0: as many as the epochs need")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises linearly")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, of matrices only")
    adam_beta2: float = option(0.95, "AdamW's second beta (both releases: 0.999)")

    # Fixed for most algorithms; an algorithm may turn them into options.
    optimizer: ClassVar[str] = "adamw"
    # Default learning rates: of all weights and of LoRA, below and above 1B parameters.
    rates: ClassVar[dict[str, float]] = {
        "small": 1e-5, "large": 5e-7, "small lora": 1e-3, "large lora": 2e-4}
    facts: ClassVar[bool] = False  # whether examples carry the image's captions
    captions: ClassVar[str | None] = None  # image_to_caption.json, where the data is the user's


@dataclass
class Corrected(Training):
    """Options of the algorithms that learn from corrected responses: the built-in feedback.

    `feedback` "rankings" takes as many ranked pairs of the base's answers instead of corrections.
    """

    feedback: str = option("corrections", "of the built-in annotator: corrections of the base's "
                           "answers, or rankings of two", choices=("corrections", "rankings"))
    corrections: int = option(
        1400, "corrections to collect (built-in world); RLHF-V's number", least=1)
    overlook: float = option(0.0, "share of false spans that annotators overlook in corrections")
    noise: float = option(0.0, "share of corrections that also make a true statement false, or of "
                          "rankings that are wrong")


@dataclass
class Run:
    """Options that every algorithm shares."""

    algo: str = option("ddpo", "what to run")
    out: str = option("", "output folder; default runs/<algo>")
    model: str | None = option(None, "folder of a LLaVA model; default: the built-in world's base")
    data: list[str] | None = option(
        None, "JSONL or parquet files; 'world': feedback on the base's own answers")
    tower: str | None = option(
        None, "folder of the CLIP of an original LLaVA model that does not include it")
    images: str | None = option(None, "folder of the images that JSONL rows name")
    seed: int = option(0, "decides every random choice")
    lora: int = option(0, "train low-rank adapters of this rank; 0: decoder, projector and head")
    lora_alpha: float | None = option(
        None, "LoRA's scale: the update is B A alpha / rank; default: twice the rank")
    device: str = option("auto", "cpu, cuda, cuda:1 ...")
    dtype: str = option("auto", "of computation; auto: bfloat16 on a GPU, float32 on a CPU",
                        choices=("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    image_mode: str = option("auto", "pad: to a square, as in LLaVA-1.5; crop: the middle; "
                             "auto: as the model's folder says", choices=("auto", "pad", "crop"))
    test_scenes: int = option(300, "held-out scenes of the evaluation (built-in world)")
    save_every: int = option(100, "steps between checkpoints", least=1)
    log_every: int = option(10, "steps between lines of metrics.jsonl", least=1)
    tensorboard: bool = option(False, "also write the metrics as events for TensorBoard")
    skip_bad_rows: bool = option(False, "list unusable rows and leave them out")
    from_scratch: bool = option(False, "train the built-in models instead of using the shipped")
    dry_run: bool = option(False, "print the planned runs and the training rows, and stop")
    gpus: int = option(0, "with --dry_run: print the memory that each of this many GPUs needs")
    resume: bool = option(False, "continue the interrupted run in the output folder")
    overwrite: bool = option(False, "replace the run in the output folder; a finished one with the "
                             "same settings is replaced without it")

    @property
    def alpha(self) -> float:
        """LoRA's scale, as given or twice the rank."""
        return 2.0 * self.lora if self.lora_alpha is None else self.lora_alpha

    def use_bfloat16(self, device_type: str) -> bool:
        """Return whether products are computed in bfloat16; on a CPU only if asked for."""
        return self.dtype == "bfloat16" or self.dtype == "auto" and device_type == "cuda"

    def on_world(self) -> bool:
        """Return whether the run learns from the built-in world's feedback."""
        return self.data in (None, ["world"])


def add_options(parser: argparse.ArgumentParser, config: type, **choices: tuple) -> None:
    """Add an option per field of the dataclass; those not given stay out of the namespace.

    Args:
        choices: by name of the field, where the dataclass does not list them.
    """
    hints = get_type_hints(config)
    for spec in fields(config):
        kind = hints[spec.name]
        if isinstance(kind, UnionType):  # "str | None"
            kind = get_args(kind)[0]
        text = spec.metadata["help"].replace("%", "%%")
        shown = "" if spec.default in (None, "") else f" [{spec.default}]"
        common = {"help": text + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(f"--{spec.name}", action=argparse.BooleanOptionalAction, **common)
        elif allowed := spec.metadata["choices"] or choices.get(spec.name):
            parser.add_argument(f"--{spec.name}", choices=allowed, **common)
        elif kind in (int, float):
            parser.add_argument(f"--{spec.name}", type=number(kind, spec.metadata["least"]),
                                metavar=kind.__name__, **common)
        elif kind is str:
            parser.add_argument(f"--{spec.name}", metavar="str", **common)
        else:  # list[str]
            parser.add_argument(
                f"--{spec.name}", nargs="+", action="extend", metavar="str", **common)


def from_options(config: type, namespace: argparse.Namespace):
    """Make the dataclass from the options that were given."""
    names = {spec.name for spec in fields(config)}
    return config(**{name: value for name, value in vars(namespace).items() if name in names})


# ---------------------------------------------------------------- before torch is imported


def check_early(parser: argparse.ArgumentParser, **kinds: str) -> None:
    """Exit at once for a wrong argument or path: the imports that follow this call take seconds.

    Until the command sets its own handler, Ctrl-C ends the process without a traceback.

    Args:
        parser: of the options known so far; the command checks the others.
        kinds: of those options that name a path: "files" (or patterns of them), "folder" or
            "model".
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    given = parser.parse_known_args()[0]
    for name, kind in kinds.items():
        found = getattr(given, name, None) or []
        for path in found if isinstance(found, list) else [found]:
            if path not in ("world", "short") and (fault := path_fault(path, kind)):
                sys.exit(f"error: {fault}" if os.environ.get("RANK", "0") == "0" else 1)


def path_fault(path: str | Path, kind: str) -> str | None:
    """Return an error message if there is no such path, else None."""
    if kind == "files":
        there = os.path.exists(path) or glob(str(path), recursive=True)
        return None if there else f"{path}: no such file"
    if os.path.isdir(path):
        return None
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.exists()
    if kind == "model" and hub:
        return (f"{path}: no such folder; a model of the Hugging Face hub has to be downloaded "
                f"first: hf download {path} --local-dir {Path(path).name}")
    return f"{path}: no such folder"
