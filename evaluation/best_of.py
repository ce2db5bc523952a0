"""Best of n: choose the one of several sampled answers that a reward model scores highest.

This measures what a reward model is worth before any training on it: the policy stays unchanged,
and only the choice among its own samples differs. A reward model that was trained with facts gets
the captions of the images.
"""

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import split
from evaluation.answers import ImageQuestion
from formats.checkpoint import find_device, fingerprint
from formats.readers import captions_of, read_captions
from formats.rows import skipping
from scoring import Judge, load_judge

BATCH = 64  # questions whose answers are scored at a time


@dataclass
class BestOf:
    """A choice among `samples` answers to each question, drawn at a temperature."""

    judge: Judge
    samples: int
    temperature: float
    captions: dict[str, list[str]] = field(default_factory=dict)  # by image

    @property
    def label(self) -> str:
        """The text that identifies the choice in an answers file."""
        rewards = self.judge.reward_model
        head = torch.cat([rewards.weight, rewards.bias[None]]).detach().cpu().numpy().tobytes()
        return (f"best_of={self.samples} facts={bool(self.judge.facts)} "
                f"reward_model={fingerprint(rewards.model)} "
                f"head={hashlib.sha256(head).hexdigest()[:16]}")

    def facts(self, asked: ImageQuestion) -> Sequence[str]:
        """Return the captions that the judge needs; DataError if they are missing."""
        return captions_of(asked.name, asked.image, self.captions) if self.judge.facts else ()

    def with_captions(
        self, questions: Sequence[ImageQuestion], skip: list[str] | None
    ) -> list[ImageQuestion]:
        """Return the questions whose captions are known; `skip` as in `formats.rows.skipping`."""
        known = []
        for each in questions:
            with skipping(skip):
                self.facts(each)
                known.append(each)
        return known

    def answers(
        self, asked: Sequence[ImageQuestion], images: Sequence[Image.Image], texts: Sequence[str]
    ) -> list[str]:
        """Choose answers to questions of a file."""
        facts = [self.facts(each) for each in asked]
        return self.choose([each.question for each in asked], images, texts, facts)

    @torch.no_grad()
    def choose(
        self, questions: Sequence[str], images: Sequence[Image.Image] | Tensor,
        texts: Sequence[str], facts: Sequence[Sequence[str]],
    ) -> list[str]:
        """Return one text per question, out of its `samples` consecutive ones in `texts`.

        Args:
            images: one per question; or the judge's own features of them (see `Judge.features`).
            facts: captions of each image, for a judge that was trained with them.

        Raises:
            ValueError: a reward is NaN or infinite.
        """
        features = images if isinstance(images, Tensor) else self.judge.features(images)
        groups = split(texts, self.samples)
        rewards = self.judge.rate(questions, features, groups, facts, BATCH)
        if bad := int((~rewards.isfinite()).sum()):
            raise ValueError(f"the reward model gave NaN or infinity for {bad} of {len(rewards)} "
                             "answers; train it with a smaller --learning_rate")
        best = rewards.view(-1, self.samples).argmax(1).tolist()  # the first of equal ones
        return [group[place] for group, place in zip(groups, best)]


def misuse(args: Namespace) -> str:
    """Return what is wrong with the options of best of n, or ""."""
    if bool(args.best_of) != bool(args.reward_model):
        return "--best_of N and --reward_model DIR belong together"
    if args.best_of and (args.best_of < 2 or args.temperature == 0):
        return "--best_of needs at least 2 samples, and a --temperature above 0"
    if args.best_of and (args.compare or args.image or args.answers or args.replies):
        return "--best_of chooses among answers that are sampled here"
    return ""


def load(args: Namespace) -> BestOf:
    """Load the reward model that the command line names, and the captions if it needs them.

    Raises:
        ValueError: it needs captions, and no file of them is given.
    """
    judge, known = load_judge(Path(args.reward_model), find_device(args.device)), {}
    if judge.facts is None:  # a published one
        judge.facts = bool(args.captions)
    if judge.facts and not args.run:  # the built-in world has its own
        if not args.captions:
            raise ValueError(f"{args.reward_model}: the reward model was trained with facts; "
                             "give the images' captions with --captions image_to_caption.json")
        known = read_captions(args.captions)
    return BestOf(judge, args.best_of, args.temperature, known)
