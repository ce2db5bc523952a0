"""Bad input, caught in one place: a sentence that names the row, before a kernel reads past an end.

Looking at values on a GPU means waiting for it, so all questions about the values of the integers
and weights travel to the host in one copy, and the results are looked at once, after the work:
NaN or infinity in the hidden states or the vocabulary matrix always reaches the log-probs.
Tensors on the meta device have no values and pass: that is how FLOPs are counted at full size.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_head(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Shapes, dtypes and devices of the three tensors that `token_logp` takes."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (R, D) and weight (V, D) with the same D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight must be (V, D) with V and D at least 1: {tuple(weight.shape)}")
    check_rows("target", target, len(hidden))
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            "hidden and weight must share one dtype of float32, bfloat16 and float16, got "
            f"{hidden.dtype} and {weight.dtype}: convert one with .to() (autocast does not)"
        )
    if target.dtype != torch.long:
        raise ValueError(f"target must hold token ids as torch.long, got {target.dtype}")
    check_devices(hidden=hidden, weight=weight, target=target)


def check_pairs(
    hidden: Tensor, segment_weight: Tensor, group: Tensor, reference: Tensor, beta: float
) -> None:
    """Shapes, dtypes and devices of what `ddpo_loss` takes beside them."""
    check_rows("segment_weight", segment_weight, len(hidden))
    check_rows("group", group, len(hidden))
    if reference.dim() != 1 or len(reference) == 0 or len(reference) % 2:
        raise ValueError(
            "reference must be (G,), one score per response, chosen and rejected in turn, so G "
            f"is even and at least 2; got shape {tuple(reference.shape)}"
        )
    if group.dtype != torch.long:
        raise ValueError(f"group must hold response numbers as torch.long, got {group.dtype}")
    if not (segment_weight.is_floating_point() and reference.is_floating_point()):
        raise ValueError(
            "segment_weight and reference must be floating point, got "
            f"{segment_weight.dtype} and {reference.dtype}"
        )
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be a finite number above 0, got {beta}")
    check_devices(hidden=hidden, segment_weight=segment_weight, group=group, reference=reference)


def check_rows(name: str, tensor: Tensor, rows: int) -> None:
    if tensor.shape != (rows,):
        raise ValueError(
            f"{name} must have one entry per row of hidden, ({rows},), got {tuple(tensor.shape)}"
        )


def check_devices(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def check_values(
    target: Tensor, vocabulary: int, segment_weight: Tensor, group: Tensor, reference: Tensor
) -> tuple[Tensor, list[int]]:
    """Values of targets, groups and weights; one copy to the host.

    Returns the row where each group begins and where the last one ends, (G + 1,), on the device
    and as a list. On the meta device the rows are taken as evenly divided among the groups.
    """
    G, R = len(reference), len(target)
    if target.is_meta:
        bounds = [R * k // G for k in range(G + 1)]
        return torch.empty(G + 1, dtype=torch.long, device="meta"), bounds
    edges = torch.searchsorted(group, torch.arange(G + 1, device=group.device))
    sums = torch.zeros(G, dtype=segment_weight.dtype, device=group.device)
    sums.index_add_(0, group.clamp(0, G - 1), segment_weight)
    rules = [  # where a rule is broken, and what to say about the first such place
        target_rule(target, vocabulary),
        (
            outside(group, G),
            lambda r: f"group {group[r]} in row {r} is not one of the {G} responses of reference",
        ),
        (
            group.diff() < 0,
            lambda r: f"group falls from {group[r]} to {group[r + 1]} after row {r}: sort the rows",
        ),
        (
            ~segment_weight.isfinite() | (segment_weight < 0),
            lambda r: f"segment weight {segment_weight[r]} in row {r} is not a number from 0 up",
        ),
        (
            ~reference.isfinite(),
            lambda k: f"reference score {reference[k]} of response {k} is not finite",
        ),
        (edges.diff() == 0, lambda k: f"response {k} is empty: no row has group {k}"),
        (sums == 0, lambda k: f"the segment weights of response {k} sum to zero"),
    ]
    broken = torch.stack([places.any() for places, _ in rules])
    numbers = torch.cat([broken.long(), edges]).tolist()  # the one wait for the device
    raise_first(rules, numbers[: len(rules)])
    return edges, numbers[len(rules) :]


def check_targets(target: Tensor, vocabulary: int) -> None:
    """Token ids lie in the vocabulary; one copy to the host."""
    if not target.is_meta:
        rule = target_rule(target, vocabulary)
        raise_first([rule], [bool(rule[0].any())])


def check_results(logp: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Log-probs (R,) are finite, or what is to blame; one copy to the host."""
    if logp.is_meta or bool(logp.isfinite().all()):
        return
    row = first(~logp.isfinite())
    if not hidden[row].isfinite().all():
        raise ValueError(f"hidden states of row {row} contain NaN or infinity")
    if not weight.isfinite().all():
        raise ValueError(
            "the vocabulary matrix contains NaN or infinity, first in the row of token "
            f"{first(~weight.isfinite().all(dim=1))}"
        )
    raise ValueError(f"the logits of row {row} overflow {hidden.dtype}; use bfloat16 or float32")


def target_rule(target: Tensor, vocabulary: int):
    return (
        outside(target, vocabulary),
        lambda r: f"target {target[r]} in row {r} is outside the vocabulary of {vocabulary} tokens",
    )


def raise_first(rules: list, broken: list) -> None:
    for (places, sentence), is_broken in zip(rules, broken):
        if is_broken:
            raise ValueError(sentence(first(places)))


def outside(numbers: Tensor, end: int) -> Tensor:
    return (numbers < 0) | (numbers >= end)


def first(places: Tensor) -> int:
    return int(places.nonzero()[0])
