"""LLaVA's tokenizer: LLaMA's sentencepiece model plus the tokens `<image>` and `<pad>`.

The convention is that of the original LLaVA code and of transformers' legacy LlamaTokenizer: the
text around every `<image>` is tokenized piece by piece, and each piece begins with sentencepiece's
dummy space. `<image>` and `<pad>` follow the sentencepiece vocabulary, as in the llava-hf models.

What this file does differently, and why: `</s>`, `<s>`, `<unk>` and `<pad>` written in a text are
ordinary characters, so no text can end an answer or hide from the loss. All other ids equal those
of transformers' AutoTokenizer. (The class LlamaTokenizer of transformers 5, called by name, merges
spaces differently.)
"""

import io
import re
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece

from formats.files import write_atomic

IMAGE = "<image>"
SYSTEM = (  # begins every conversation of LLaVA's vicuna_v1
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


class Tokenizer:
    """A sentencepiece model with `<image>` and `<pad>`; their ids default to the next two."""

    def __init__(
        self, path: Path | str | bytes, image_token: int | None = None, pad_token: int | None = None
    ):
        self.model_proto = path if isinstance(path, bytes) else Path(path).read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.model_proto)
        size = self.sp.vocab_size()
        self.image_token = size if image_token is None else image_token
        self.pad_token = size + 1 if pad_token is None else pad_token
        self.bos_token, self.eos_token = self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = max(size, self.image_token + 1, self.pad_token + 1)
        shared = list(range(size)).__getitem__  # one int per id: 8 bytes per token, not 36
        self._pieces = lru_cache(maxsize=65536)(
            lambda text: tuple(map(shared, self.sp.encode(text))))

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, image: bool = True
    ) -> list[int]:
        """Return the ids of a text, with begin- or end-of-sequence if asked.

        Args:
            image: False takes `<image>` for ordinary characters, as in what a model wrote.
        """
        ids = [self.bos_token] if bos else []
        for i, piece in enumerate(text.split(IMAGE) if image else [text]):
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


def sentencepiece_model(file: Path, content: dict) -> bytes:
    """Return the sentencepiece model that a tokenizer.json was made from, except for its scores.

    sentencepiece merges the pair whose piece has the best score, tokenizer.json the pair that comes
    first in a list: places in the list serve as scores.

    Raises:
        ValueError: it is not a BPE with byte fallback, as LLaMA's is.
    """
    model = content["model"]
    bpe = model.get("type") == "BPE" and model.get("byte_fallback")
    if not bpe or "<unk>" not in model["vocab"]:
        raise ValueError(f"{file}: not LLaMA's kind of tokenizer; add the tokenizer.model that the "
                         "weights were trained with")
    scores: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -place)

    def number(value: int) -> bytes:  # protobuf's varint
        return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value >> 7)

    def part(field: int, body: bytes) -> bytes:  # protobuf's length-delimited field
        return number(field * 8 + 2) + number(len(body)) + body

    proto = b""
    for piece, i in sorted(model["vocab"].items(), key=lambda item: item[1]):
        kind = 2 if piece == "<unk>" else 3 if piece in ("<s>", "</s>") else 1
        kind = 6 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else kind  # unknown, control, byte
        score = struct.pack("<f", scores.get(piece, -len(scores) - i))
        proto += part(1, part(1, piece.encode()) + b"\x15" + score + b"\x18" + number(kind))
    ids = (model["vocab"][piece] for piece in ("<unk>", "<s>", "</s>"))
    trainer = b"\x18\x02" + number(35 * 8) + b"\x01"  # BPE, with byte fallback
    trainer += b"".join(number(field * 8) + number(i) for field, i in zip((40, 41, 42), ids))
    normalizer = part(1, b"identity") + b"\x18\x01\x20\x00\x28\x01"  # a space first; keep spaces
    return proto + part(2, trainer) + part(3, normalizer)


def added_tokens(tokenizer: Tokenizer) -> list[dict]:
    """Return the tokens that `transformers` finds in a text before it cuts the text into pieces."""
    sp = tokenizer.sp
    last = max(tokenizer.image_token, tokenizer.pad_token)
    ids = {i: f"<extra_{i}>" for i in range(sp.vocab_size(), last)}  # rows that the base added
    ids |= {i: sp.id_to_piece(i) for i in (sp.unk_id(), sp.bos_id(), sp.eos_id())}
    ids |= {tokenizer.image_token: "<image>", tokenizer.pad_token: "<pad>"}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return [{"id": i, "content": ids[i], "special": True, **flags} for i in sorted(ids)]


def fast_tokenizer(sp: sentencepiece.SentencePieceProcessor, added: list[dict]) -> dict:
    """Return a sentencepiece BPE model as tokenizer.json, which opens without sentencepiece.

    sentencepiece merges the pair whose piece has the best score, tokenizer.json the pair that comes
    first in a list. The list therefore has every way to cut a piece in two, ordered by score.
    """
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    score = [sp.get_score(i) for i in range(sp.vocab_size())]
    special = lambda i: sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)
    merges = [
        (-score[i], vocab[piece[:cut]], vocab[piece[cut:]], f"{piece[:cut]} {piece[cut:]}")
        for piece, i in vocab.items() if not special(i) for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    bos = sp.id_to_piece(sp.bos_id())
    first, second = ([{"SpecialToken": {"id": bos, "type_id": i}},
                      {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1))
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            # Legacy: every text between added tokens begins with its own space.
            {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"),
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "vocab": vocab, "merges": [text for *_, text in sorted(merges)],
        },
    }


def train_tokenizer(texts: Iterable[str], path: Path | str, vocab_size: int = 800) -> None:
    """Train a small sentencepiece model with LLaMA's settings: BPE, byte fallback, raw text.

    The result depends on the texts alone, as only one thread trains.
    """
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=proto, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )
    write_atomic(path, proto.getvalue())
