"""Find the tokens that a person changed in a response (RLHF-V, arXiv 2312.00849, section 3.2).

The corrected and the original response are aligned token by token. Common runs of a few tokens are
unchanged; everything between them, on either side, is a corrected segment.
"""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

COMPARISONS = 20_000_000  # of tokens, at most, to align two responses: a few seconds


def segment_mask(
    chosen: Sequence[int], rejected: Sequence[int], min_match: int = 3,
    replacements_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the tokens of two responses in corrected segments (RLHF-V, section 3.2).

    Args:
        chosen, rejected: token ids of the corrected and of the original response.
        min_match: a common run shorter than this counts as changed, as in the released code.
        replacements_only: as in the released code, a segment that was only inserted or deleted
            keeps weight 1. By default it counts, as in the paper's Eq. 5.

    Returns:
        bool (Tc,) and (Tr,), True = corrected segment.

    Raises:
        ValueError: the comparison would take too long.
    """
    masks = torch.ones(len(chosen), dtype=torch.bool), torch.ones(len(rejected), dtype=torch.bool)
    a = b = 0  # where the current changed span begins, on either side
    ends = difflib.Match(len(chosen), len(rejected), 0)
    for block in [*common_runs(chosen, rejected, max(1, min_match)), ends]:
        if replacements_only and (block.a == a or block.b == b):
            masks[0][a : block.a] = masks[1][b : block.b] = False
        a, b = block.a + block.size, block.b + block.size
        masks[0][block.a : a] = masks[1][block.b : b] = False
    return masks


def common_runs(first: Sequence[int], second: Sequence[int], least: int) -> list[difflib.Match]:
    """Return difflib's matching blocks of at least `least` tokens, in order.

    difflib finds the longest run, then the longest on either side of it, and so on. Here the search
    stops where the longest run is too short, and COMPARISONS bounds it: on texts that repeat
    themselves it takes up to cubic time.
    """
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    found, parts, comparisons = [], [(0, len(first), 0, len(second))], 0
    while parts:
        start, stop, begin, end = parts.pop()
        comparisons += sum(len(matcher.b2j.get(token, ())) for token in first[start:stop])
        if comparisons > COMPARISONS:
            raise ValueError("chosen and rejected are too long, or repeat themselves too often, to "
                             "find what was corrected")
        run = matcher.find_longest_match(start, stop, begin, end)
        if run.size >= least:
            found.append(run)
            parts += [(start, run.a, begin, run.b), (run.a + run.size, stop, run.b + run.size, end)]
    return sorted(found)
