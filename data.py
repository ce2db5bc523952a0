"""From rows to batches: prompts, responses, and the one `Batch`.

Every algorithm scores responses to an image and a prompt, so every algorithm reads the same batch.
A row is a shared prefix, the *trunk* (image + prompt), followed by its *branches* (the responses):

    tokens    <s> USER: <image>.. Describe ASSISTANT: | A  red car . </s> | A blue car . </s> | pad
    branch     0    0       0        0         0      | 1   1   1  1   1  | 2   2   2  2   2  | -1
    position   0    1       2        3         4      | 5   6   7  8   9  | 5   6   7  8   9  |  0

The first token of every branch is predicted by the last token of the trunk. `source` is therefore
an index into the hidden states, not a shift by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from random import Random

import torch
from torch import Tensor

import parallel
from formats.rows import DataError, Source
from formats.readers import Conversation, Pair, Turn
from formats.tokenizer import IMAGE, SYSTEM, Tokenizer
from model import LLaVA
from segments import segment_mask

# ----------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Response:
    """Tokens of a branch and their weights; weight 0 marks tokens that are given, not predicted."""

    tokens: list[int]
    weight: list[float]


@dataclass(frozen=True)
class Example:
    """One row: an image, a prompt, its responses, and what the rewards use."""

    name: str  # for error messages: file and row
    image: Tensor | None  # (patches, D_vision) features of the tower, or (3, H, W) pixels
    prompt: list[int]  # the conversation up to the assistant's turn
    responses: list[Response] = field(default_factory=list)  # chosen first; empty before sampling
    question: str = ""
    facts: Sequence[str] = ()  # captions of the image, for factual augmentation
    truth: str | None = None  # the right answer: an option A-D, "yes", "no"; None: an open question
    length_factor: float = 1.0  # scales the length penalty of this prompt
    picture: str = ""  # file name of the image
    source: Source | None = None  # where the image is, for a reward model with its own tower
    content: str = ""  # identifies what the tower reads (`Features.digest`)


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    images: Tensor | None  # (M, 3, H, W) pixels or (M, patches, D) features of the rows with image
    tokens: Tensor  # (B, T) long: trunk, then branches one after another, right-padded
    position: Tensor  # (B, T) long: rotary position; every branch restarts at its trunk's length
    branch: Tensor  # (B, T) long: 0 trunk, 1..K branch, -1 padding
    # One entry per predicted response token, all rows of the batch flattened:
    source: Tensor  # (R,) index into the flattened (B*T) hidden states that predicts the token
    target: Tensor  # (R,) the token
    weight: Tensor  # (R,) segment weight: gamma in corrected segments, 1 elsewhere
    group: Tensor  # (R,) which response (0..G-1) the token belongs to
    groups: int  # G
    # On the host, so reading them does not wait for a GPU:
    bounds: list[int] = field(default_factory=list)  # (G + 1,) entries where responses begin, and R
    padding: float = 0.0  # share of token slots that are padding
    names: list[str] = field(default_factory=list)  # (B,) file and row of each example
    counts: bool = True  # False: computed only because other processes wait for it (parallel.py)

    def to(self, device) -> "Batch":
        move = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        return type(self)(**{name: move(value) for name, value in vars(self).items()})


def common_prefix(responses: list[Response]) -> int:
    """Count the leading tokens that two or more responses share, leaving at least one to each."""
    if len(responses) < 2:
        return 0
    shortest = min(len(response.tokens) for response in responses) - 1
    first = responses[0]
    for i in range(shortest):
        if any(r.tokens[i] != first.tokens[i] for r in responses):
            return i
    return shortest


def collate(examples: list[Example], pad_token: int, max_length: int) -> Batch:
    """Make one batch. Tokens that begin all responses of a row move into its trunk.

    Args:
        examples: rows, at least one.
        pad_token: id that fills the ends of short rows.
        max_length: the model's context; the prompt must fit into it with any one response.

    Raises:
        DataError: a response is empty or does not fit; nothing is cut silently.
    """
    rows, sources, targets, weights, groups, bounds = [], [], [], [], [], [0]
    for row, example in enumerate(examples):
        check_lengths(example.name, example.prompt, example.responses, max_length)
        shared = common_prefix(example.responses)
        tokens = example.prompt + example.responses[0].tokens[:shared]
        start = len(tokens)
        position, branch = list(range(start)), [0] * start
        for k, response in enumerate(example.responses):
            own = response.tokens[shared:]
            at = len(tokens)  # slot of the branch's first own token
            # predicting slots: from the prompt's last to the trunk's last, then the branch's
            predictor = [*range(len(example.prompt) - 1, start), *range(at, at + len(own) - 1)]
            for slot, token, weight in zip(
                    predictor, response.tokens, response.weight, strict=True):
                if weight > 0:
                    sources.append((row, slot))
                    targets.append(token)
                    weights.append(weight)
                    groups.append(len(bounds) - 1)
            tokens = tokens + own
            position.extend(range(start, start + len(own)))
            branch.extend([k + 1] * len(own))
            bounds.append(len(targets))
        rows.append((tokens, position, branch))

    width = max(len(tokens) for tokens, _, _ in rows)
    fill = lambda i, value: torch.tensor([r[i] + [value] * (width - len(r[i])) for r in rows])
    images = [example.image for example in examples if example.image is not None]
    return Batch(
        images=torch.stack(images) if images else None,
        tokens=fill(0, pad_token), position=fill(1, 0), branch=fill(2, -1),
        source=torch.tensor([row * width + slot for row, slot in sources]),
        target=torch.tensor(targets), weight=torch.tensor(weights), group=torch.tensor(groups),
        groups=len(bounds) - 1, bounds=bounds, names=[example.name for example in examples],
        padding=1 - sum(len(tokens) for tokens, _, _ in rows) / (width * len(rows)),
    )


def micro_batches(model: LLaVA, examples: list[Example], size: int) -> list[Batch]:
    """Make batches of `size` rows; rows of similar length go together, which saves padding."""
    return shared_batches(partial(collate_for, model), sorted(examples, key=row_length), size)


def shared_batches(make: Callable[[Sequence], Batch], rows: Sequence, size: int) -> list[Batch]:
    """Make this process's batches of at most `size` rows; without torchrun, all of them."""
    return [replace(make(part), counts=counts) for part, counts in parallel.shares(rows, size)]


def collate_for(model: LLaVA, examples: list[Example]) -> Batch:
    """Collate with a model's padding token and context."""
    return collate(examples, model.config.pad_token, model.config.text.max_position_embeddings)


def check_lengths(
    name: str, prompt: Sequence[int], responses: Sequence[Response], max_length: int
) -> None:
    """Raise DataError if a response is empty, or too long for the model's context."""
    for response in responses:
        if not any(weight > 0 for weight in response.weight):
            raise DataError(f"{name}: a response has no token to learn from")
        length = len(prompt) + len(response.tokens)
        if length > max_length:
            raise DataError(
                f"{name}: prompt and response have {length} tokens, the context holds "
                f"{max_length}; shorten the text or leave the row out (--skip_bad_rows)")


def row_length(example: Example) -> int:
    """Count the slots of the example's row; the prefix that its responses share counts once."""
    saved = (len(example.responses) - 1) * common_prefix(example.responses)
    return len(example.prompt) + sum(len(r.tokens) for r in example.responses) - saved


def split(items: Sequence, size: int) -> list[Sequence]:
    """Cut items into consecutive parts of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Epochs:
    """Examples in a seeded order, a new one every epoch. The step number decides the batch.

    To save padding, rows of one batch have similar lengths: the shuffled examples are sorted by
    length within pools of POOL batches, cut into batches, and the batches shuffled.
    """

    POOL = 16  # a larger pool hardly saves more padding and makes epochs more alike

    def __init__(self, examples: list, config, seed: int, length: Callable = row_length):
        """Take batch_size, epochs and steps from `config`; `length` measures an example."""
        self.all, self.batch_size, self.seed = examples, config.batch_size, seed
        self.steps = config.steps or math.ceil(config.epochs * len(examples) / config.batch_size)
        self._lengths = [length(example) for example in examples]
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> list[int]:
        rng, order = Random(f"epoch {self.seed} {epoch}"), list(range(len(self.all)))
        rng.shuffle(order)
        # A batch that spans two epochs takes its rows from the ends, which stay unsorted.
        start = min(-epoch * len(order) % self.batch_size, len(order))
        stop = start + (len(order) - start) // self.batch_size * self.batch_size
        batches = []
        for pool in split(order[start:stop], self.POOL * self.batch_size):
            batches += split(sorted(pool, key=self._lengths.__getitem__), self.batch_size)
        rng.shuffle(batches)
        return [*order[:start], *(i for batch in batches for i in batch), *order[stop:]]

    def examples(self, step: int) -> list[Example]:
        if not self.all:
            raise ValueError("there are no rows to train on")
        first = step * self.batch_size
        places = (divmod(i, len(self.all)) for i in range(first, first + self.batch_size))
        return [self.all[self._order(epoch)[i]] for epoch, i in places]


# ------------------------------------------------------------------------------ from rows to tokens


def prompt_text(question: str, image: bool = True) -> str:
    """Return the vicuna_v1 conversation up to the assistant's turn."""
    return f"{SYSTEM} USER: {IMAGE + chr(10) if image else ''}{question} ASSISTANT:"


def reward_request(facts: Sequence[str] = ()) -> str:
    """Return the question that follows an answer to be judged, with the image's captions."""
    return "Is this true?" + (f" Facts: {'; '.join(facts)}." if facts else "")


def prompt_tokens(tokenizer: Tokenizer, text: str, patches: int) -> list[int]:
    """Encode begin-of-sequence and `text`; `<image>` becomes one token per image feature."""
    ids = []
    for token in tokenizer.encode(text, bos=True):
        ids.extend([token] * (patches if token == tokenizer.image_token else 1))
    return ids


def turn(tokenizer: Tokenizer, given: str, answer: str) -> Response:
    """Return a branch that begins with `given` and learns only `answer` and end-of-sequence."""
    before, after = tokenizer.encode(given), tokenizer.encode(answer, eos=True)
    return Response(before + after, [0.0] * len(before) + [1.0] * len(after))


def trunk_tokens(
    tokenizer: Tokenizer, history: Sequence[Turn], question: str, patches: int
) -> list[int]:
    """Encode earlier turns and the question, up to the assistant's turn.

    Args:
        patches: image features before the first question; 0 for text alone.
    """
    questions = [*(asked for asked, _ in history), question]
    ids = prompt_tokens(tokenizer, prompt_text(questions[0], patches > 0), patches)
    for (_, answer), following in zip(history, questions[1:]):
        ids += tokenizer.encode(answer, eos=True) + tokenizer.encode(next_question(following))
    return ids


def next_question(question: str) -> str:
    """Return a later turn of the vicuna_v1 conversation; it follows `</s>` directly."""
    return f"USER: {question} ASSISTANT:"


def pair_tokens(
    pair: Pair, tokenizer: Tokenizer, patches: int, gamma: float = 1.0, min_match: int = 3,
    replacements_only: bool = False,
) -> tuple[list[int], list[Response]]:
    """Encode the prompt and both responses of a preference pair, chosen first.

    Tokens in corrected segments weigh gamma, all others 1 (RLHF-V, Eq. 5).
    """
    texts = [tokenizer.encode(text, eos=True, image=False)
             for text in (pair.chosen, pair.rejected)]
    weights = [[1.0] * len(tokens) for tokens in texts]
    if gamma != 1:
        try:
            masks = segment_mask(*texts, min_match, replacements_only)
        except ValueError as error:
            raise DataError(f"{pair.name}: {error}; shorten them or leave the row out "
                            "(--skip_bad_rows)") from None
        weights = [torch.where(mask, gamma, 1.0).tolist() for mask in masks]
    prompt = trunk_tokens(tokenizer, pair.history, pair.question, patches)
    return prompt, list(map(Response, texts, weights))


def conversation_tokens(
    conversation: Conversation, tokenizer: Tokenizer, patches: int
) -> tuple[list[int], list[Response]]:
    """Encode the first question as the prompt, and the rest as one response.

    All tokens equal those of LLaVA's preprocess_v1, and so do those that are learnt: each answer
    and its end-of-sequence.
    """
    patches = 0 if conversation.image is None else patches
    (question, answer), *later = conversation.turns
    turns = [turn(tokenizer, "", answer)]
    turns += [turn(tokenizer, next_question(q), a) for q, a in later]
    response = Response([t for x in turns for t in x.tokens], [w for x in turns for w in x.weight])
    return trunk_tokens(tokenizer, (), question, patches), [response]


def segments(response: Response, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Split a response into (text, weight of its tokens), an entry per run of equal weight."""
    found, text, start = [], "", 0
    for end in range(1, len(response.tokens) + 1):
        if end < len(response.tokens) and response.weight[end] == response.weight[start]:
            continue
        whole = tokenizer.decode(response.tokens[:end])
        if end < len(response.tokens):  # of a character that is split, nothing is shown yet
            whole = whole.rstrip("\ufffd")
        shown = whole[len(text) :] + "</s>" * (response.tokens[end - 1] == tokenizer.eos_token)
        found.append((shown, response.weight[start]))
        text, start = whole, end
    return found
