"""LLaVA's tokenizer: LLaMA's sentencepiece model plus the tokens `<image>` and `<pad>`.

The convention is that of the original LLaVA code and of transformers' legacy LlamaTokenizer: the
text around every `<image>` is tokenized piece by piece, and each piece begins with sentencepiece's
dummy space. `<image>` and `<pad>` come behind the sentencepiece vocabulary, as in the llava-hf
models.

What this file does differently, and why:

1. `</s>`, `<s>`, `<unk>` and `<pad>` written in a text are ordinary characters, so no text can end
   an answer or hide from the loss. All other ids equal those of transformers' AutoTokenizer. (The
   class LlamaTokenizer of transformers 5, called by name, merges spaces in another way.)
"""

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece

from formats.files import write_atomic

IMAGE = "<image>"


class Tokenizer:
    """A sentencepiece model with `<image>` and `<pad>`; their ids default to the next two."""

    def __init__(
        self, path: Path | str, image_token: int | None = None, pad_token: int | None = None
    ):
        self.model_proto = Path(path).read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_proto)
        size = self.sp.vocab_size()
        self.image_token = size if image_token is None else image_token
        self.pad_token = size + 1 if pad_token is None else pad_token
        self.bos_token, self.eos_token = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = max(size, self.image_token + 1, self.pad_token + 1)
        self._pieces = lru_cache(maxsize=65536)(lambda text: tuple(self.sp.encode(text)))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, with begin- or end-of-sequence if asked."""
        ids = [self.bos_token] if bos else []
        for i, piece in enumerate(text.split(IMAGE)):
            ids += [self.image_token] * (i > 0)
            ids += self._pieces(piece)
        return ids + [self.eos_token] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that was encoded, without begin-of-sequence, end-of-sequence and padding.

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


def train_tokenizer(texts: Iterable[str], path: Path | str, vocab_size: int = 800) -> None:
    """Train a small sentencepiece model with LLaMA's settings: BPE, byte fallback, raw text.

    Deterministic: the result depends on the texts alone, as only one thread trains.
    """
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=proto, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )
    write_atomic(path, proto.getvalue())
