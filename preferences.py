"""What reward models and PPO learn from: prompts with their images seen and facts attached.

`readers.py` checks the rows of LLaVA-RLHF's files (arXiv 2309.14525). Here they get what training
needs: the image's features from the frozen tower (once per image), the prompt's tokens, captions
for factual augmentation, and the right answer where the row tells it (`caption_type`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from data import Tokenizer, trunk_tokens
from features import Features, Named
from readers import Prompt as PromptRow
from readers import captions_of, read_captions, read_pairs, read_prompts
from rows import DataError, skipping

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
        self, look: Callable[[Named], Features], tokenizer: Tokenizer, patches: int,
        captions: str | None, skip: list[str] | None = None,
    ):
        """
        Args:
            look: gives the features of the rows' images; see `features.look`.
            captions: an image_to_caption.json, for factual augmentation; None attaches no facts.
            skip: if given, messages about bad rows are collected here instead of raised.
        """
        self.look, self.tokenizer, self.patches, self.skip = look, tokenizer, patches, skip
        self.captions = read_captions(captions) if captions else None

    def rankings(self, patterns: Sequence[str], images: str | None) -> list[Ranked]:
        """Ranked pairs from any of the preference formats; DataError as `readers.read_pairs`."""
        def ranked(row, image):
            encode = lambda text: self.tokenizer.encode(text, eos=True)
            prompt = self.prompt(row, image, row.history)
            return Ranked(prompt, encode(row.chosen), encode(row.rejected))

        return self.each(ranked, read_pairs(patterns, images, self.skip))

    def prompts(self, patterns: Sequence[str], images: str | None) -> list[Prompt]:
        """Prompts for PPO, from any format that has questions; DataError as `read_prompts`."""
        return self.each(self.prompt, read_prompts(patterns, images, self.skip))

    def each(self, make: Callable, rows: Sequence) -> list:
        seen, made = self.look([(row.name, row.image) for row in rows]), []
        for i, row in enumerate(rows):
            with skipping(self.skip):
                made.append(make(row, seen[i]))
        if not made:
            raise DataError("no usable row is left")
        return made

    def prompt(self, row, image: Tensor, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        truth, factor = None, 1.0
        if isinstance(row, PromptRow):
            truth, factor = TRUTHS[row.caption_type], row.length_bonus
        if truth in ("A", "B", "C", "D") and f"{truth}." not in row.question:
            raise DataError(f"{row.name}: the right option is {truth}, but the question lists no "
                            f"{truth!r} followed by a full stop")
        facts = []
        if self.captions is not None:
            facts = captions_of(row.name, row.image, self.captions)
        picture = getattr(row.image, "name", "")
        tokens = trunk_tokens(self.tokenizer, history, row.question, self.patches)
        return Prompt(row.name, image, tokens, row.question, facts, truth, factor, picture)
