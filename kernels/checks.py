"""Input checks: raise a ValueError that names the row, before a kernel reads past the end.

Reading a value from a GPU waits for the device, so each function copies all it needs at once.
Tensors on the meta device, on which FLOPs are counted at full size, have no values and pass.
"""

from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensors(hidden: Tensor, weight: Tensor, *others: Tensor, **rows: Tensor) -> None:
    """Check shapes, dtypes and devices; `rows` have one entry per row of `hidden`."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (R, D) and weight (V, D) with the same D, got {shapes}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            "hidden and weight must share one dtype of float32, bfloat16 and float16, got "
            f"{hidden.dtype} and {weight.dtype}: convert one with .to() (autocast does not)")
    for name, tensor in rows.items():
        shape, got = (len(hidden),), tuple(tensor.shape)
        if shape != got:
            raise ValueError(f"{name} must have one entry per row of hidden, {shape}, got {got}")
        if name in ("target", "group") and tensor.dtype != torch.long:
            raise ValueError(f"{name} must be torch.long, got {tensor.dtype}")
    devices = [str(tensor.device) for tensor in (hidden, weight, *rows.values(), *others)]
    if len(set(devices)) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(devices)}")


def check_values(
    target: Tensor, vocabulary: int, group: Tensor | None = None, groups: int = 0,
    bounds: list[int] | None = None,
) -> tuple[Tensor, list[int]]:
    """Check token ids and, if given, the response of each row; with `bounds`, check only those.

    Returns the row where each group begins and where the last one ends, (G + 1,), on the device
    and as a list. On the meta device the groups divide the rows evenly.
    """
    if target.is_meta:
        bounds = [len(target) * k // max(groups, 1) for k in range(groups + 1)]
        return torch.empty(groups + 1, dtype=torch.long, device="meta"), bounds
    edges = target.new_zeros(1)
    if group is not None:
        edges = torch.searchsorted(group, torch.arange(groups + 1, device=group.device))
    if bounds is None:
        bounds = read_bounds(target, vocabulary, group, groups, edges)
    elif len(bounds) != groups + 1 or bounds[0] != 0 or bounds[-1] != len(target):
        raise ValueError(f"bounds must be {groups + 1} numbers from 0 to {len(target)}")
    for k, (start, stop) in enumerate(pairwise(bounds)):
        if start >= stop:
            raise ValueError(f"response {k} is empty: no row has group {k}")
    return edges, bounds


def read_bounds(
    target: Tensor, vocabulary: int, group: Tensor | None, groups: int, edges: Tensor
) -> list[int]:
    """Return edges as a list, copied from the device together with the outcome of the checks."""
    outside = (target < 0) | (target >= vocabulary)
    rules = [("target", target, outside, f"is outside the vocabulary of {vocabulary} tokens")]
    if group is not None:
        outside, falls = (group < 0) | (group >= groups), group.diff(prepend=group[:1]) < 0
        rules += [
            ("group", group, outside, f"is not one of the {groups} responses of reference"),
            ("group", group, falls, "is smaller than the group before it: sort the rows"),
        ]
    broken = torch.stack([places.any() for _, _, places, _ in rules]).long()
    answers = torch.cat([broken, edges]).tolist()  # the one wait for the device
    for is_broken, (name, numbers, places, sentence) in zip(answers, rules):
        if is_broken:
            row = first(places)
            raise ValueError(f"{name} {numbers[row]} in row {row} {sentence}")
    return answers[len(rules) :]


def check_results(logp: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Check that log-probs (R,) are finite; NaN or infinity in an input reaches them.

    Except for an infinite weight that only gives logits of -inf: it reaches the gradient.
    """
    if logp.is_meta or bool(logp.isfinite().all()):
        return
    row = first(~logp.isfinite())
    if not hidden[row].isfinite().all():
        raise ValueError(f"hidden states of row {row} contain NaN or infinity")
    if not weight.isfinite().all():
        token = first(~weight.isfinite().all(dim=1))
        raise ValueError(f"the vocabulary matrix contains NaN or infinity, first for token {token}")
    raise ValueError(f"the logits of row {row} overflow {hidden.dtype}; use bfloat16 or float32")


def first(places: Tensor) -> int:
    return int(places.nonzero()[0])
