"""Supervised fine-tuning on given answers (SFT; LLaVA, Liu et al. 2023, arXiv 2304.08485).

The loss is the negative mean log-probability of the answers' tokens; questions do not count. Rows
are conversations, or preference pairs, whose chosen answer is learnt.

What this file does differently from LLaVA's released code:
1. AdamW's betas are (0.9, 0.95), the release's (0.9, 0.999): `--adam_beta2 0.999`. The warm-up is a
   tenth of the steps, the release's 3 %: `--warmup 0.03`. There are 3 passes over the data, the
   release's 1: `--epochs 1`.
2. With `--lora` only the decoder's adapters are trained; the release trains the projector, too.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from algorithm import Algorithm, Data, Start
from config import Corrected, Training, option
from data import Batch, Epochs, collate_for, conversation_tokens, shared_batches


def supervised_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Negative weighted mean of log-probabilities.

    Args:
        logp: (R,) of the tokens that are learnt.
        weight: (R,) of each of them.
    """
    return -(weight * logp).sum() / weight.sum()


@dataclass
class SFTConfig(Corrected):
    feedback: str = option(
        "corrections", "of the built-in annotator: corrections of the base's answers, rankings of "
        "two, questions with short answers, or descriptions from habit, of whole or of cropped "
        "pictures", choices=("corrections", "rankings", "questions", "descriptions", "cropped"))
    learning_rate: float | None = option(
        None, "peak learning rate [3e-4, with --lora 3e-3; of a model of 1B and more 2e-5, with "
        "--lora 2e-4 (both LLaVA-1.5's)]")
    # On the built-in world 2e-5 hardly trains.
    rates = {"small": 3e-4, "large": 2e-5, "small lora": 3e-3, "large lora": 2e-4}


class SFT(Algorithm):
    """Fine-tune on given answers (SFT)."""

    Config = SFTConfig
    reads = "conversations"

    def __init__(self, start: Start, config: Training, data: Data | None = None, source=None):
        """`source`, an object with `steps` and `examples(step)`, replaces the data."""
        self.model, self.config = start.model, config
        self.modules = nn.ModuleDict({"model": self.model})
        self.source = source or Epochs(data.train, config, start.run.seed)
        self.steps = self.source.steps

    @staticmethod
    def tokens(row, tokenizer, patches: int, config: SFTConfig):
        return conversation_tokens(row, tokenizer, patches)

    def batches(self, step: int) -> list[Batch]:
        make = partial(collate_for, self.model)
        return shared_batches(make, self.source.examples(step), self.config.micro_batch)

    def size(self, batch: Batch) -> float:
        return batch.weight.sum().item()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        logp = self.model.response_logp(batch)  # (R,)
        return supervised_loss(logp, batch.weight), {"padding": batch.padding}
