"""What reward models and PPO learn from: prompts with their images seen and facts attached.

`readers.py` checks the rows of LLaVA-RLHF's files (arXiv 2309.14525). Here they get what training
needs: the image's features from the frozen tower (once per image), the prompt's tokens, captions
for factual augmentation, and the right answer where the row tells it (`caption_type`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from data import Tokenizer, trunk_tokens
from readers import Prompt as PromptRow
from readers import captions_of, read_captions, read_pairs, read_prompts
from rows import DataError

TRUTHS = {1: None, 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}  # by caption_type


@dataclass
class Prompt:
    """A question about an image, ready to be answered."""

    name: str  # for error messages: file and row
    image: Tensor  # (patches, D_vision) features of the tower
    tokens: list[int]  # the conversation up to where the assistant is to speak
    question: str
    facts: list[str]  # captions of the image; empty where none are wanted
    truth: str | None = None  # the right answer: an option A-D, "yes", "no"; None: a free answer
    length_factor: float = 1.0  # scales the length penalty of this prompt
    picture: str = ""  # file name of the image


@dataclass
class Ranked:
    """A prompt and two answers to it, as tokens that end with end-of-sequence."""

    prompt: Prompt
    chosen: list[int]
    rejected: list[int]


class Reader:
    """Turns rows into prompts."""

    def __init__(
        self, see: Callable, tokenizer: Tokenizer, patches: int,
        captions: str | None, skip: list[str] | None = None,
    ):
        """
        Args:
            see: `see(name, source)` gives the features of an image; one call per image.
            captions: an image_to_caption.json, for factual augmentation; None attaches no facts.
            skip: if given, messages about bad rows are collected here instead of raised.
        """
        self.see, self.tokenizer, self.patches, self.skip = see, tokenizer, patches, skip
        self.captions = read_captions(captions) if captions else None
        self.seen: dict = {}

    def rankings(self, patterns: Sequence[str], images: str | None) -> list[Ranked]:
        """Ranked pairs from any of the preference formats; DataError as `readers.read_pairs`."""
        def ranked(row):
            encode = lambda text: self.tokenizer.encode(text, eos=True)
            return Ranked(self.prompt(row, row.history), encode(row.chosen), encode(row.rejected))

        return self.each(ranked, read_pairs(patterns, images, self.skip))

    def prompts(self, patterns: Sequence[str], images: str | None) -> list[Prompt]:
        """Prompts for PPO, from any format that has questions; DataError as `read_prompts`."""
        return self.each(self.prompt, read_prompts(patterns, images, self.skip))

    def each(self, make: Callable, rows: Sequence) -> list:
        made = []
        for row in rows:
            try:
                made.append(make(row))
            except DataError as error:
                if self.skip is None:
                    raise
                self.skip.append(str(error))
        if not made:
            raise DataError("no usable row is left")
        return made

    def prompt(self, row, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        truth, factor = None, 1.0
        if isinstance(row, PromptRow):
            truth, factor = TRUTHS[row.caption_type], row.length_bonus
        if truth in ("A", "B", "C", "D") and f"{truth}." not in row.question:
            raise DataError(f"{row.name}: the right option is {truth}, but the question lists no "
                            f"{truth!r} followed by a full stop")
        facts = []
        if self.captions is not None:
            facts = captions_of(row.name, row.image, self.captions)
        if row.image not in self.seen:
            self.seen[row.image] = self.see(row.name, row.image)
        picture = getattr(row.image, "name", "")
        tokens = trunk_tokens(self.tokenizer, history, row.question, self.patches)
        return Prompt(
            row.name, self.seen[row.image], tokens, row.question, facts, truth, factor, picture)
