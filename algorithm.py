"""The interface of an algorithm: its inputs, and what the training loop asks of it.

A new algorithm is one file with a dataclass of hyperparameters and a class derived from
`Algorithm`, and one line in `train.ALGORITHMS`. The README shows a whole one.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Run, Training
from data import Example, Response
from formats.tokenizer import Tokenizer
from model import LLaVA
from vision import ImageSettings


@dataclass
class Start:
    """What an algorithm starts from."""

    run: Run
    model: LLaVA  # on its device; the weights that will be trained require gradients
    tokenizer: Tokenizer
    images: ImageSettings
    folder: Path  # of the run: for what an algorithm caches or writes beside its result
    base: str = ""  # fingerprint of the model whose answers the data holds
    reward_model: Path | None = None  # folder of the run that made it, for algorithms that use one

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def key(self) -> str:
        """Part of the names of what this base answered, which also depends on its precision."""
        return self.base[:8] + "-bf16" * (self.model.head.weight.dtype == torch.bfloat16)

    @property
    def bfloat16(self) -> bool:
        return self.run.use_bfloat16(self.device.type)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute matrix products in bfloat16 if the run does; weights and sums stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


@dataclass
class Data:
    """What an algorithm learns from."""

    train: list[Example]
    held_out: list[Example] = field(default_factory=list)  # for an algorithm's own measure
    # The false parts of an answer to an example, None where the truth is unknown; for logs only.
    false_parts: Callable[[Example, str], list[str] | None] = lambda example, answer: None
    # The annotator's correction of an answer to an example; None where there is no annotator.
    correct: Callable[[Example, str], str | None] = lambda example, answer: None

    def digest(self) -> str:
        """Identify the rows: a hash of all that is learned from and rewarded."""
        digest = hashlib.sha256()
        for each in (*self.train, *self.held_out):
            row = replace(each, image=None, source=None)  # `content` stands for both
            digest.update(repr(row).encode())
        return digest.hexdigest()


class Algorithm:
    """Made as `Algorithm(start, config, data)`; sets `config`, `modules` and `steps`.

    The first line of a subclass's docstring describes the run in the report and in `--help`.
    """

    Config: type[Training] = Training  # its hyperparameters; command-line options follow from them
    reads: str = "pairs"  # kind of rows: pairs, conversations, rankings or prompts; "": none
    first: tuple[str, ...] = ("base",)  # built-in runs that come first (see recipes.plan)

    config: Training
    modules: nn.ModuleDict  # holds all weights that are trained
    steps: int  # optimizer steps

    @classmethod
    def depends(cls, config: Training) -> tuple[str, ...]:
        """Return the built-in runs that a run with these settings depends on."""
        return cls.first

    @staticmethod
    def tokens(row, tokenizer: Tokenizer, patches: int, config) -> tuple[list[int], list[Response]]:
        """Return a row's prompt tokens and responses; an image takes `patches` tokens."""
        raise NotImplementedError

    @staticmethod
    def read_as(responses: list[Response], facts: Sequence[str], tokenizer: Tokenizer, config
                ) -> list[Response]:
        """Return a row's responses as the model reads them, to check that they fit."""
        return responses

    def batches(self, step: int) -> list:
        """Return the micro-batches of an optimizer step."""
        raise NotImplementedError

    def loss(self, batch) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a micro-batch, and metrics to log."""
        raise NotImplementedError

    def size(self, batch) -> float:
        """Return a micro-batch's weight in its step: the number of items that the loss averages."""
        return len(batch.names)

    def peak_rate(self, name: str) -> float:
        """Return the peak learning rate of a weight, by its name in `modules`."""
        return self.config.learning_rate

    def measure(self, world: Callable, means: Callable) -> tuple[dict, list[dict]] | None:
        """Return (metrics, records) of the model in its present state, or None.

        Args:
            world: () -> the same, of its answers about the built-in world's held-out scenes.
            means: ({name: (N,) numbers}) -> metrics: means with 95 % bootstrap intervals.
        """
        return world()

    def state(self) -> dict:
        """Return what resuming needs besides weights and optimizer."""
        return {}

    def load_state(self, state: dict) -> None:
        """Restore what `state` returned."""

    def save(self, folder: Path) -> None:
        """Write the files of the result other than the model."""
