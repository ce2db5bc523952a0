"""From records to batches: tokenizer and template, segment diff, and the one `Batch`.

    python data.py convert IN OUT      between the formats of preference data, see convert.py

Every algorithm scores responses to an image and a prompt, so every algorithm eats the same batch:
rows of one *trunk* (image + prompt) and its *branches* (responses, one after another):

    tokens    <s> USER: <image>.. Describe ASSISTANT: | A  red car . </s> | A blue car . </s> | pad
    branch     0    0       0        0         0      | 1   1   1  1   1  | 2   2   2  2   2  | -1
    position   0    1       2        3         4      | 5   6   7  8   9  | 5   6   7  8   9  |  0

The first token of every branch is predicted by the last token of the trunk: `source` is therefore
an index into the hidden states and not a shift by one.
"""

import difflib
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

import sentencepiece
import torch
from torch import Tensor

from readers import IMAGE, Conversation, Pair, Turn
from rows import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


# ------------------------------------------------------------------------------ tokens and prompts


class Tokenizer:
    """sentencepiece plus the two tokens LLaVA adds behind it, `<image>` and `<pad>`.

    Text around `<image>` is tokenized piece by piece, and every piece begins with sentencepiece's
    dummy space, as in the original LLaVA code and in transformers' legacy LlamaTokenizer. The ids
    are those of transformers' tokenizers with one exception: `</s>`, `<s>`, `<unk>` and `<pad>`
    written in a text are ordinary characters here, so no text can end an answer or hide from the
    loss. (The class LlamaTokenizer of transformers 5, called by name, merges spaces in its own way;
    AutoTokenizer and AutoProcessor do not.)
    """

    def __init__(self, path, image_token: int | None = None, pad_token: int | None = None):
        self.path = Path(path)
        self.model_proto = self.path.read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_proto)
        size = self.sp.vocab_size()
        self.image_token = size if image_token is None else image_token
        self.pad_token = size + 1 if pad_token is None else pad_token
        self.bos_token, self.eos_token = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = max(size, self.image_token + 1, self.pad_token + 1)
        self._pieces = lru_cache(maxsize=65536)(lambda text: tuple(self.sp.encode(text)))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = [self.bos_token] if bos else []
        for i, piece in enumerate(text.split(IMAGE)):
            if i > 0:
                ids.append(self.image_token)
            ids.extend(self._pieces(piece))
        return ids + [self.eos_token] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text that was encoded; begin, end and padding are left out.

        Lossless up to sentencepiece itself, which writes a space as U+2581 and cannot tell the two
        apart afterwards.
        """
        pieces = [[]]
        for i in map(int, ids):
            if i == self.image_token:
                pieces.append([])
            elif i < self.sp.vocab_size() and i != self.pad_token:
                pieces[-1].append(i)
        return IMAGE.join(map(self.sp.decode, pieces))


def prompt_text(question: str, image: bool = True) -> str:
    """The vicuna_v1 conversation up to where the assistant speaks."""
    return f"{SYSTEM} USER: {IMAGE + chr(10) if image else ''}{question} ASSISTANT:"


def judging_request(facts: Sequence[str] = ()) -> str:
    """The question behind an answer that is to be judged, with the image's captions if given.

    LLaVA-RLHF's factual augmentation: the judge is shown the facts (arXiv 2309.14525, section 2.3).
    """
    return "Is this true?" + (f" Facts: {'; '.join(facts)}." if facts else "")


def prompt_tokens(tokenizer: Tokenizer, text: str, patches: int) -> list[int]:
    """Begin-of-sequence and `text`, every `<image>` widened to one token per image feature."""
    ids = []
    for token in tokenizer.encode(text, bos=True):
        ids.extend([token] * (patches if token == tokenizer.image_token else 1))
    return ids


def train_tokenizer(texts: Iterator[str], path, vocab_size: int = 800) -> None:
    """A small sentencepiece model of `texts`, in LLaMA's manner (BPE, byte fallback, text as it is).

    Deterministic: one thread, and the texts decide everything.
    """
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=proto, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )
    Path(path).write_bytes(proto.getvalue())


# ------------------------------------------------------------------------------- corrected segments


def segment_mask(
    chosen: Sequence[int], rejected: Sequence[int], min_match: int = 3,
    replacements_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which tokens of two responses belong to corrected segments (RLHF-V, section 3.2).

    Args:
        chosen, rejected: token ids of the corrected and of the original response.
        min_match: a common run shorter than this counts as changed, as in the released code.
        replacements_only: the released code's habit: a segment that was purely inserted or
            deleted keeps weight 1. The paper's Eq. 5, and the default here, counts it.

    Returns:
        bool (Tc,) and (Tr,), True = corrected segment.
    """
    matcher = difflib.SequenceMatcher(None, chosen, rejected, autojunk=False)
    masks = torch.ones(len(chosen), dtype=torch.bool), torch.ones(len(rejected), dtype=torch.bool)
    a = b = 0  # where the current changed span begins, on either side
    for block in matcher.get_matching_blocks():
        last = block.size == 0  # difflib closes with an empty block at both ends
        if block.size < min_match and not last:
            continue
        if replacements_only and (block.a == a or block.b == b):
            masks[0][a : block.a] = masks[1][b : block.b] = False
        a, b = block.a + block.size, block.b + block.size
        masks[0][block.a : a] = masks[1][block.b : b] = False
    return masks


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Response:
    """Tokens of a branch and their weights; weight 0 marks tokens that are given, not predicted."""

    tokens: list[int]
    weight: list[float]


def turn(tokenizer: "Tokenizer", given: str, answer: str, weight: float = 1.0) -> Response:
    """A branch that is given `given` and learns to go on with `answer` and end-of-sequence."""
    before, after = tokenizer.encode(given), tokenizer.encode(answer, eos=True)
    return Response(before + after, [0.0] * len(before) + [weight] * len(after))


@dataclass
class Example:
    """One row to be: an image (pixels or cached features), a prompt and its responses."""

    name: str  # for error messages: file and row
    image: Tensor | None
    prompt: list[int]
    responses: list[Response]
    reference: list[float] | None = None  # the reference model's score of each response


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
    reference: Tensor | None = None  # (G,) the reference model's scores
    names: list[str] = field(default_factory=list)  # (B,) file and row of each example

    def to(self, device) -> "Batch":
        move = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        return type(self)(**{name: move(value) for name, value in vars(self).items()})

    @property
    def padding(self) -> float:
        """Share of token slots that hold nothing."""
        return (self.branch == -1).float().mean().item()


def common_prefix(responses: list[Response]) -> int:
    """How many leading tokens all of at least two responses share, each keeping one of its own."""
    if len(responses) < 2:
        return 0
    shortest = min(len(response.tokens) for response in responses) - 1
    first = responses[0]
    for i in range(shortest):
        if any(r.tokens[i] != first.tokens[i] for r in responses):
            return i
    return shortest


def collate(examples: list[Example], pad_token: int, max_length: int) -> Batch:
    """Examples as one batch. Tokens with which all responses of a row begin move into its trunk.

    Args:
        examples: rows, at least one.
        pad_token: id that fills the ends of short rows.
        max_length: the model's context; no trunk with any one of its branches may be longer.

    Raises:
        DataError: a response is empty or does not fit; nothing is ever cut silently.
    """
    rows, sources, targets, weights, groups = [], [], [], [], []
    total = 0
    for row, example in enumerate(examples):
        check_lengths(example, max_length)
        shared = common_prefix(example.responses)
        tokens = example.prompt + example.responses[0].tokens[:shared]
        start = len(tokens)
        position, branch = list(range(start)), [0] * start
        for k, response in enumerate(example.responses):
            own = response.tokens[shared:]
            at = len(tokens)  # slot of the branch's first own token
            # slots that predict: through the shared tokens, the trunk's last, then the branch
            predictor = [*range(len(example.prompt) - 1, start), *range(at, at + len(own) - 1)]
            for slot, token, weight in zip(predictor, response.tokens, response.weight, strict=True):
                if weight > 0:
                    sources.append((row, slot))
                    targets.append(token)
                    weights.append(weight)
                    groups.append(total)
            tokens = tokens + own
            position.extend(range(start, start + len(own)))
            branch.extend([k + 1] * len(own))
            total += 1
        rows.append((tokens, position, branch))

    width = max(len(tokens) for tokens, _, _ in rows)
    fill = lambda i, value: torch.tensor([r[i] + [value] * (width - len(r[i])) for r in rows])
    images = [example.image for example in examples if example.image is not None]
    reference = [score for example in examples for score in example.reference or ()]
    return Batch(
        images=torch.stack(images) if images else None,
        tokens=fill(0, pad_token), position=fill(1, 0), branch=fill(2, -1),
        source=torch.tensor([row * width + slot for row, slot in sources]),
        target=torch.tensor(targets), weight=torch.tensor(weights), group=torch.tensor(groups),
        groups=total, reference=torch.tensor(reference) if reference else None,
        names=[example.name for example in examples],
    )


def check_lengths(example: Example, max_length: int) -> None:
    for response in example.responses:
        if not any(weight > 0 for weight in response.weight):
            raise DataError(f"{example.name}: a response has no token to learn from")
        length = len(example.prompt) + len(response.tokens)
        if length > max_length:
            raise DataError(
                f"{example.name}: prompt and response have {length} tokens, the context holds "
                f"{max_length}; shorten the text or leave the row out (--skip_bad_rows)"
            )


def row_length(example: Example) -> int:
    """Slots of the example's row: what its responses share counts once."""
    again = (len(example.responses) - 1) * common_prefix(example.responses)
    return len(example.prompt) + sum(len(r.tokens) for r in example.responses) - again


def split(items: Sequence, size: int) -> list[Sequence]:
    """Consecutive parts of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Epochs:
    """Examples in a seeded order, a new one every epoch. A step's number decides what it sees.

    Rows of one batch are of like length, so that little of it is padding: the shuffled examples are
    sorted by length within pools of POOL batches, cut into batches, and the batches shuffled.
    """

    POOL = 16  # a larger pool saves little padding, and the more alike do batches of all epochs get

    def __init__(self, examples: list, config, seed: int, length: Callable = row_length):
        """`config` has batch_size, epochs and steps (`config.Training`); `length` is of an example."""
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
        first = step * self.batch_size
        places = (divmod(i, len(self.all)) for i in range(first, first + self.batch_size))
        return [self.all[self._order(epoch)[i]] for epoch, i in places]


# ------------------------------------------------------------------------- from records to examples


def trunk_tokens(
    tokenizer: Tokenizer, history: Sequence[Turn], question: str, patches: int
) -> list[int]:
    """Earlier turns and the question, up to where the assistant speaks.

    Args:
        patches: image features before the first question; 0 for text alone.
    """
    questions = [*(asked for asked, _ in history), question]
    ids = prompt_tokens(tokenizer, prompt_text(questions[0], patches > 0), patches)
    for (_, answer), following in zip(history, questions[1:]):
        ids += tokenizer.encode(answer, eos=True) + tokenizer.encode(next_question(following))
    return ids


def next_question(question: str) -> str:
    """A later turn of the vicuna_v1 conversation; `</s>` alone stands between it and the answer."""
    return f"USER: {question} ASSISTANT:"


def pair_example(
    pair: Pair, image: Tensor | None, tokenizer: Tokenizer, patches: int, gamma: float = 1.0,
    min_match: int = 3, replacements_only: bool = False,
) -> Example:
    """A preference pair as an Example: weight gamma in corrected segments, 1 elsewhere (Eq. 5)."""
    answers = [tokenizer.encode(text, eos=True) for text in (pair.chosen, pair.rejected)]
    masks = segment_mask(*answers, min_match, replacements_only)
    responses = [
        Response(tokens, torch.where(mask, gamma, 1.0).tolist())
        for tokens, mask in zip(answers, masks)
    ]
    prompt = trunk_tokens(tokenizer, pair.history, pair.question, patches)
    return Example(pair.name, image, prompt, responses)


def conversation_example(
    conversation: Conversation, image: Tensor | None, tokenizer: Tokenizer, patches: int
) -> Example:
    """A conversation as an Example whose one branch learns every answer and is given the questions.

    Trunk and branch together are the tokens of the whole conversation, as LLaVA's preprocess_v1
    makes them, and so are those that are learnt: each answer and its end-of-sequence.
    """
    patches = 0 if conversation.image is None else patches
    (question, answer), *later = conversation.turns
    turns = [turn(tokenizer, "", answer)]
    turns += [turn(tokenizer, next_question(q), a) for q, a in later]
    response = Response([t for x in turns for t in x.tokens], [w for x in turns for w in x.weight])
    prompt = trunk_tokens(tokenizer, (), question, patches)
    return Example(conversation.name, image, prompt, [response])


def marked(response: Response, tokenizer: Tokenizer) -> str:
    """The response's text with corrected segments in [brackets], what is only given in {braces}."""
    text, out, start = "", "", 0
    for end in range(1, len(response.tokens) + 1):
        if end < len(response.tokens) and response.weight[end] == response.weight[start]:
            continue
        whole = tokenizer.decode(response.tokens[:end])  # so that no character is cut in two
        segment = whole[len(text) :] + "</s>" * (response.tokens[end - 1] == tokenizer.eos_token)
        weight = response.weight[start]
        out += f"[{segment}]" if weight > 1 else segment if weight > 0 else f"{{{segment}}}"
        text, start = whole, end
    return out


if __name__ == "__main__":
    import convert

    sys.exit(convert.main(sys.argv[1:]))
