"""How a hyperparameter is declared: once, in a dataclass, and the command line follows from it.

    @dataclass
    class Config(Training):
        beta: float = option(0.5, "strength of the tie to the reference (RLHF-V, section 4.1)")

gives `--beta`, its type, its default and its line in `--help`. Booleans become `--x / --no-x`.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import get_args, get_type_hints


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Training:
    """What every algorithm's optimisation needs; each algorithm sets its own defaults."""

    learning_rate: float = option(1e-5, "peak learning rate")
    batch_size: int = option(32, "rows per optimizer step")
    micro_batch: int = option(32, "rows per forward pass; smaller needs less memory, same result")
    epochs: int = option(3, "passes over the data")
    steps: int = option(0, "optimizer steps; 0: as many as the epochs need")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises linearly")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One option per field of the dataclass; those not given stay out of the namespace."""
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
        elif spec.metadata["choices"]:
            parser.add_argument(f"--{spec.name}", choices=spec.metadata["choices"], **common)
        elif kind in (int, float, str):
            parser.add_argument(f"--{spec.name}", type=kind, metavar=kind.__name__, **common)
        else:  # list[str]
            parser.add_argument(f"--{spec.name}", nargs="+", metavar="str", **common)


def from_options(config: type, namespace: argparse.Namespace):
    """The dataclass with the options that were given."""
    names = {spec.name for spec in dataclasses.fields(config)}
    return config(**{name: value for name, value in vars(namespace).items() if name in names})
