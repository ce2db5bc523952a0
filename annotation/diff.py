"""The difference of two answers as training weighs it, located in their texts.

`segments.segment_mask` compares token ids, an annotator reads characters: here every corrected
segment is mapped to the text that it covers on either side.
"""

import os
import re
import zlib
from collections.abc import Sequence

from formats.tokenizer import Tokenizer
from segments import segment_mask

WORD = re.compile(r"\w+|[^\w\s]")
END = -1  # end-of-sequence, where words stand for tokens


class Units:
    """The units in which texts are compared: a model's tokens, or words if there is no model."""

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer, self.name = tokenizer, "tokens" if tokenizer else "words"

    def ids(self, text: str) -> list[int]:
        """Return the ids of all units and of the end, which training also weighs."""
        if self.tokenizer:
            return self.tokenizer.encode(text, eos=True)
        return [zlib.crc32(word.encode()) for word in WORD.findall(text)] + [END]

    def cut(self, text: str, ids: Sequence[int], place: int) -> tuple[int, int]:
        """Return where unit `place` begins in the text, rounded down and up to whole characters.

        The two differ if a character has several tokens and the unit begins inside it.
        """
        if place >= len(ids) - 1:
            return len(text), len(text)
        if self.tokenizer is None:
            end = [0, *(match.end() for match in WORD.finditer(text))][place]
            return end, end
        before = self.tokenizer.decode(ids[:place])
        down = len(os.path.commonprefix([before, text]))
        return down, min(len(text), down + (len(before) > down))


def compare(units: Units, rejected: str, chosen: str) -> dict:
    """Align an answer with its correction.

    Returns:
        parts: both texts in reading order; {"same": text}, or a corrected segment {"old", "new":
            text, "rejected", "chosen": [start, end] in characters, "units": [old, new] counts,
            "end": whether the end of the answer is among them}.
        kept: share of the answer's units that the correction keeps.
    """
    old, new = units.ids(rejected), units.ids(chosen)
    if units.tokenizer:  # some tokenizers normalise: show the text as the model reads it
        rejected, chosen = units.tokenizer.decode(old), units.tokenizer.decode(new)
    new_mask, old_mask = (mask.tolist() for mask in segment_mask(new, old))
    parts, i, j, shown = [], 0, 0, 0
    while i < len(old) or j < len(new):
        a, b = i, j
        while i < len(old) and old_mask[i]:
            i += 1
        while j < len(new) and new_mask[j]:
            j += 1
        if (i, j) != (a, b):
            out = [units.cut(rejected, old, a)[0], units.cut(rejected, old, i)[1]]
            put = [units.cut(chosen, new, b)[0], units.cut(chosen, new, j)[1]]
            parts += [{"same": chosen[shown : put[0]]}, {
                "old": rejected[slice(*out)], "new": chosen[slice(*put)],
                "rejected": out, "chosen": put, "units": [i - a, j - b],
                "end": i == len(old) > a or j == len(new) > b}]
            shown = put[1]
        while i < len(old) and j < len(new) and not old_mask[i] and not new_mask[j]:
            i, j = i + 1, j + 1
    parts.append({"same": chosen[shown:]})
    kept = old_mask[:-1].count(False) / max(1, len(old) - 1)
    return {"parts": [part for part in parts if part.get("same") != ""], "kept": kept}
