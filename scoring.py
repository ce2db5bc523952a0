"""The reward of a completion: the reward model's score, and the release's rules without a model.

    reward = score of the reward model
             + symbolic bonus (a right option, a rightly denied object)
             + length penalty + penalty for a missing end-of-sequence token

The rules and their constants are those of LLaVA-RLHF (arXiv 2309.14525, section 2.4, and its code).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import option
from data import Example
from formats.tokenizer import Tokenizer
from reward import RewardModel, Row, rate


@dataclass
class SamplingConfig:
    """Options of algorithms that sample completions and score them, beside those of `Training`."""

    prompts: int = option(2000, "prompts to make on the built-in world")
    samples: int = option(4, "completions per prompt", least=1)
    generate_batch: int = option(64, "prompts decoded at a time", least=1)
    max_new_tokens: int = option(128, "completions are cut off here (release: 896)", least=1)
    temperature: float = option(
        1.0, "of sampling and of all log-probabilities (release)", least=0.01)
    reward_model: str | None = option(None, "folder of a run of --algo rm")
    facts: bool = option(False, "give the reward model the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    symbolic_bonus: float = option(2.0, "scales the reward of right options, yes and no (release)")
    length_penalty: float = option(10.0, "for a completion of --length_penalty_tokens (release)")
    length_penalty_tokens: int = option(896, "tokens that cost the whole length penalty (release)")
    missing_eos_penalty: float = option(
        -8.0, "for a completion without end-of-sequence (release)", least=-float("inf"))


def symbolic_reward(text: str, truth: str | None) -> float:
    """Whether an answer to a question with a known truth is right, as the release scores it.

    Args:
        text: the answer.
        truth: "A".."D", the right option: 1 if the answer starts with "A." or contains "correct
            option is A.", else 0. "no": +0.5 for an answer that starts with "No", -0.5 for "Yes",
            else 0: saying yes to everything is the fault to be cured. "yes" and None: 0.
    """
    text = text.strip()
    if truth == "no":
        return 0.5 * text.startswith("No") - 0.5 * text.startswith("Yes")
    if truth in ("A", "B", "C", "D"):
        return float(text.startswith(f"{truth}.") or f"correct option is {truth}." in text)
    return 0.0


def length_penalty(length: int, full: int, factor: float = 1.0, weight: float = 10.0) -> float:
    """-`weight` for an answer of `full` tokens, in proportion for other lengths (release).

    Args:
        length: tokens of the answer.
        full: tokens that cost the whole penalty.
        factor: the prompt's own scale (`length_bonus` in the files); 0: no penalty.
        weight: the release's 10.
    """
    return -weight * factor * length / full


def missing_eos_penalty(ended: bool, penalty: float = -8.0) -> float:
    """The penalty for an answer without end-of-sequence, cut off at the length limit (release)."""
    return 0.0 if ended else penalty


class Scorer:
    """The reward of completions: the reward model's score and the rules."""

    def __init__(self, reward_model: RewardModel, tokenizer: Tokenizer, config: SamplingConfig):
        self.reward_model, self.tokenizer, self.config = reward_model, tokenizer, config

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Parts of the reward, each (N,), the completions of all examples one after another.

        Raises:
            ValueError: the reward model returned NaN or infinity.
        """
        scores = rate(self.reward_model, self.tokenizer, rows, self.config.micro_batch)
        names = [example.name for example, completions in rows for _ in completions]
        bad = [name for name, finite in zip(names, scores.isfinite().tolist()) if not finite]
        if bad:
            raise ValueError(
                f"the reward model gave NaN or infinity for {len(bad)} of {len(names)} answers (to "
                f"{', '.join(dict.fromkeys(bad[:8]))}); train it with a smaller --learning_rate")
        rules = [self.rules(example, each) for example, completions in rows for each in completions]
        symbolic, length, no_end = torch.tensor(rules).T
        return {"rm": scores, "symbolic": symbolic, "length": length, "no_end": no_end}

    def rules(self, example: Example, completion: Sequence[int]) -> tuple[float, float, float]:
        config, text = self.config, self.tokenizer.decode(completion)
        ended = self.tokenizer.eos_token in completion
        return (
            config.symbolic_bonus * symbolic_reward(text, example.truth),
            length_penalty(len(completion), config.length_penalty_tokens, example.length_factor,
                           config.length_penalty),
            missing_eos_penalty(ended, config.missing_eos_penalty),
        )
