"""B and C: gradients through the vocabulary matrix, a piece of the logits at a time.

Both compute exact gradients (`reference.py` derives them) and never hold the (R, V) logits. One
product costs 2 R V D FLOPs; a training step needs at least three (z = H W^T, dH = dz W,
dW = dz^T H), which `bench.py` calls the matmul floor.

    B "chunks": across rows                      C "slices": across the vocabulary

            V                                        V = slices of at least 1024
        +-----------------------+                    +-----+-----+-----+-----+
     R  |  pairs 0..10          | chunk 0        R   |     |     |     |     |
        +-----------------------+                    |  0  |  1  |  2  | ... |
        |  pairs 11..20         | chunk 1            |     |     |     |     |
        +-----------------------+                    +-----+-----+-----+-----+
        |  pairs 21..31         | chunk 2
        +-----------------------+

B turns a chunk of logits into dz in place, writes dH of those rows and adds to dW. For the DDPO
loss a chunk holds whole pairs: their scores, and so every row's coefficient, are known while the
logits are in memory, and the forward computes the gradients at the floor's 3 products.
(`token_logp` gets its coefficients in the backward and computes the chunk again: 4 products.)

C takes lse from a first pass that keeps no logits (kernel A), computes each slice of logits again,
writes that slice of dW once, in its final precision, and adds to dH: 4 products. Memory besides
inputs and gradients, at R = 6400, V = 32064, D = 4096, bfloat16:

                B                                          C
    logits      frozen head: 1600 rows   103 MB            R x 5120            66 MB
                trained: all rows        410 MB
    sums        none                                       dH, float32        105 MB

Several chunks need a float32 sum of dW. So with a trained head in half precision B takes all rows
at once where their logits are no larger: up to R = 2 D.

A, B and C round logits to the precision of the hidden states before the softmax, as a model's own
head does. So a policy equal to its reference scores the same, and lse matches the logits that the
backward computes again (where p is near 1, onehot - p is the difference of two roundings), except
for the rare logit whose rounding depends on the order of a sum. Softmax, scores, coefficients and
all sums over pieces are float32.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import preference

# Logits held at a time. On a GPU enough for full-speed products; on a CPU (16 MB in float32) more
# are no faster.
CHUNK_ELEMENTS = {"cuda": 2**26, "cpu": 2**22}  # B
SLICE_ELEMENTS = {"cuda": 2**25, "cpu": 2**22}  # C
SLICE_LEAST = 1024  # C: a narrower slice leaves the matmul too little work per row of W

Gradients = tuple[Tensor | None, Tensor | None]  # dH (R, D) and dW (V, D), where needed
Results = tuple[Tensor, ...]  # loss, rewards (G,), scores (G,), log-probs (R,)


class Backend(NamedTuple):
    """The functions that compute the softmax; `reference.py` documents their results."""

    logp_rows: Callable
    gradient_rows_: Callable
    forward_logp: Callable | None = None  # kernel A; None: chunks of logits in its place


class Inputs(NamedTuple):
    backend: Backend
    hidden: Tensor  # (R, D), contiguous, as the next two
    weight: Tensor  # (V, D)
    target: Tensor  # (R,)
    needs: tuple[bool, ...]  # whether hidden and weight need a gradient


class TokenLogp(torch.autograd.Function):
    """log p(target) (R,) float32; its backward computes the logits again piece by piece."""

    @staticmethod
    def forward(ctx, backend, method, hidden, weight, target):
        inputs = Inputs(backend, hidden, weight, target, ctx.needs_input_grad[2:4])
        # B computes the same logits as its backward will, to the last bit.
        chunks = method == "chunks" and any(inputs.needs)
        logp, lse = logp_by_chunks(inputs) if chunks else logp_without_logits(inputs)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.backend, ctx.method = backend, method
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        *tensors, lse = ctx.saved_tensors
        inputs = Inputs(ctx.backend, *tensors, ctx.needs_input_grad[2:4])
        scale = scale.float().contiguous()
        if ctx.method == "slices":
            gradients = by_slices(inputs, lse, scale)
        else:
            coefficients = lambda rows, logits: (lse[rows], scale[rows])
            gradients = by_chunks(inputs, row_chunks(inputs), coefficients)
        return None, None, *gradients, None


class Pairs(NamedTuple):
    """Preference pairs without their tokens; pair p is groups 2p and 2p + 1."""

    row_weight: Tensor  # (R,) float32, w_i / N_k of Eq. 5
    anchor: Tensor | None  # (R,) float32, alpha / (P |y|) in chosen responses, 0 in rejected ones
    reference: Tensor  # (G,) float32, the frozen model's scores
    edges: Tensor  # (G + 1,) long: group k holds rows edges[k] to edges[k + 1]
    bounds: list[int]  # edges, on the host
    beta: float
    count: int  # pairs of the whole batch, over which the loss is a mean

    def part(self, rows: slice) -> "Pairs":
        """Return the pairs in these rows."""
        first, last = self.bounds.index(rows.start), self.bounds.index(rows.stop)
        edges = self.edges[first : last + 1] - rows.start
        bounds = [bound - rows.start for bound in self.bounds[first : last + 1]]
        reference = self.reference[first:last]
        anchor = None if self.anchor is None else self.anchor[rows]
        return Pairs(
            self.row_weight[rows], anchor, reference, edges, bounds, self.beta, self.count)


class DDPOLoss(torch.autograd.Function):
    """DDPO loss, rewards (G,), scores (G,), log-probs (R,); the forward computes the gradients."""

    @staticmethod
    def forward(ctx, backend, method, hidden, weight, target, pairs):
        inputs = Inputs(backend, hidden, weight, target, ctx.needs_input_grad[2:4])
        ctx.unit, ctx.dtypes = gradient_unit(pairs), (hidden.dtype, weight.dtype)
        # Without gradients the logits have no second use: C's first pass keeps none.
        compute = ddpo_by_chunks if method == "chunks" and any(inputs.needs) else ddpo_by_slices
        results, ctx.gradients = compute(inputs, pairs, ctx.unit)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through ddpo_loss a second time: the first one scaled the gradients in "
                "place to save memory; call ddpo_loss again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (each if each is None else rescale(each, grad_loss * ctx.unit, dtype)
                  for each, dtype in zip(gradients, ctx.dtypes))
        return None, None, *scaled, None, None


def preference_of(logp: Tensor, pairs: Pairs, unit: Tensor) -> tuple[Results, Tensor]:
    """Return the pairs' results, and (dL/dlogp) / unit, (R,)."""
    scores = segment_sum(logp * pairs.row_weight, pairs.edges)
    loss, rewards, slope = preference(scores, pairs.reference, pairs.beta, pairs.count)
    scale = spread(slope / unit, pairs.edges, len(logp)) * pairs.row_weight
    if pairs.anchor is not None:
        loss = loss - (pairs.anchor * logp).sum()
        scale = scale - pairs.anchor / unit
    return (loss, rewards, scores, logp), scale


# B ------------------------------------------------------------------------------------------


def ddpo_by_chunks(inputs: Inputs, pairs: Pairs, unit: Tensor) -> tuple[Results, Gradients]:
    """Return the results, and the gradients of loss / unit, in one pass."""
    parts = []

    def coefficients(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        logp, lse = inputs.backend.logp_rows(logits, inputs.target[rows])
        results, scale = preference_of(logp, pairs.part(rows), unit)
        parts.append(results)
        return lse, scale

    chunks = equal_chunks(pairs.bounds[::2], chunk_rows(inputs))  # cut between pairs
    gradients = by_chunks(inputs, chunks, coefficients)
    losses, *rest = zip(*parts)
    return (torch.stack(losses).sum(), *map(torch.cat, rest)), gradients


def logp_by_chunks(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse, both (R,) float32."""
    logp = torch.empty_like(inputs.target, dtype=torch.float32)
    lse = torch.empty_like(logp)
    for rows, logits in chunk_logits(inputs, row_chunks(inputs)):
        logp[rows], lse[rows] = inputs.backend.logp_rows(logits, inputs.target[rows])
    return logp, lse


def by_chunks(inputs: Inputs, chunks: list[slice], coefficients: Callable) -> Gradients:
    """Return dH and dW, where needed; coefficients(rows, logits) gives lse and scale of a chunk.

    A dW summed over several chunks is float32.
    """
    backend, hidden, weight, target, needs = inputs
    sum_dtype = torch.float32 if len(chunks) > 1 else weight.dtype
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = torch.empty_like(weight, dtype=sum_dtype) if needs[1] else None
    for rows, logits in chunk_logits(inputs, chunks):
        lse, scale = coefficients(rows, logits)
        backend.gradient_rows_(logits, lse, target[rows], scale)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            add_product_(d_weight, logits.T, hidden[rows], first=rows.start == 0)
    return d_hidden, d_weight


def chunk_logits(inputs: Inputs, chunks: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's rows and their logits, in the memory of the chunk before."""
    longest = max(rows.stop - rows.start for rows in chunks)
    buffer = logits_buffer(longest, len(inputs.weight), inputs.hidden)
    for rows in chunks:
        out = buffer[: rows.stop - rows.start]
        yield rows, torch.mm(inputs.hidden[rows], inputs.weight.T, out=out)


def chunk_rows(inputs: Inputs) -> int:
    (R, D), weight = inputs.hidden.shape, inputs.weight
    if inputs.needs[1] and weight.element_size() == 2 and R <= 2 * D:
        return max(1, R)  # R V half-precision logits, no more bytes than a float32 sum of dW
    return max(1, CHUNK_ELEMENTS["cuda" if weight.is_cuda else "cpu"] // len(weight))


def row_chunks(inputs: Inputs) -> list[slice]:
    return equal_chunks(range(len(inputs.hidden) + 1), chunk_rows(inputs))


def equal_chunks(places: Sequence[int], most_rows: int) -> list[slice]:
    """Cut rows at some of these places, from the first to the last, into nearly equal chunks.

    A chunk has `most_rows` at the most, but for the distance to the nearest place.
    """
    rows, cuts = places[-1], {0, places[-1]}
    pieces = -(-rows // most_rows)
    for exact in (rows * k / pieces for k in range(1, pieces)):
        after = bisect_left(places, exact)
        cuts.add(min(places[after - 1 : after + 1], key=lambda place: abs(place - exact)))
    return [slice(*ends) for ends in pairwise(sorted(cuts))] or [slice(0, 0)]


# C ------------------------------------------------------------------------------------------


def ddpo_by_slices(inputs: Inputs, pairs: Pairs, unit: Tensor) -> tuple[Results, Gradients]:
    """Return the same as `ddpo_by_chunks`, but score all pairs first, in a pass without logits."""
    logp, lse = logp_without_logits(inputs)
    results, scale = preference_of(logp, pairs, unit)
    return results, by_slices(inputs, lse, scale)


def logp_without_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse, both (R,) float32, by kernel A or, without it, by chunks."""
    if inputs.backend.forward_logp:
        return inputs.backend.forward_logp(inputs.hidden, inputs.weight, inputs.target)
    return logp_by_chunks(inputs)


def by_slices(inputs: Inputs, lse: Tensor, scale: Tensor) -> Gradients:
    """Return dH and dW for given row coefficients `scale`, a slice of the vocabulary at a time."""
    backend, hidden, weight, target, needs = inputs
    if not any(needs):
        return None, None
    V, step = len(weight), slice_columns(hidden)
    d_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    buffer = logits_buffer(len(hidden), min(step, V), hidden)
    for start in range(0, V, step):
        columns = slice(start, min(start + step, V))
        part = weight[columns]
        logits = torch.mm(hidden, part.T, out=buffer[:, : len(part)])
        backend.gradient_rows_(logits, lse, target - start, scale)
        if d_hidden is not None:
            add_product_(d_hidden, logits, part, first=start == 0)
        if d_weight is not None:
            torch.mm(logits.T, hidden, out=d_weight[columns])
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight


def slice_columns(hidden: Tensor) -> int:
    """Return the number of columns in a slice, a multiple of 256."""
    budget = SLICE_ELEMENTS["cuda" if hidden.is_cuda else "cpu"]
    return max(SLICE_LEAST, budget // max(len(hidden), 1) // 256 * 256)


# Shared pieces ------------------------------------------------------------------------------


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Allocate (rows, columns), each row at a multiple of 64 numbers, even if V is 32,003.

    Tensor cores and wide loads need aligned rows. The padding is zero, as a matmul may read it:
    oneDNN's AMX kernels (torch 2.13, bfloat16 and float16) multiply the numbers past the end of a
    row by zero, and NaN times zero is NaN."""
    padded = -(-columns // 64) * 64
    buffer = torch.empty(rows, padded, dtype=like.dtype, device=like.device)
    buffer[:, columns:] = 0
    return buffer[:, :columns]


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to total, summed in float32 whatever a and b are; `first` overwrites instead.

    On CUDA the library adds half-precision products to a float32 total (torch >= 2.10); elsewhere
    the operands are widened.
    """
    keep = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=keep, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=keep, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=keep, out=total)


def segment_sum(values: Tensor, edges: Tensor) -> Tensor:
    """Sum values (R,) between edges (G + 1,), in a fixed order, unlike index_add on a GPU."""
    return torch.segment_reduce(values, "sum", offsets=edges, initial=0.0, unsafe=True)


def spread(per_group: Tensor, edges: Tensor, rows: int) -> Tensor:
    """Repeat per_group (G,) for every row between the group's edges -> (rows,)."""
    return per_group.repeat_interleave(edges.diff(), output_size=rows)


def gradient_unit(pairs: Pairs) -> Tensor:
    """Return a power of two of at least 16 times the largest row coefficient, the anchor's too.

    The forward computes the gradients before it knows their factor (a loss scale, 1 / accumulation
    steps), and a coefficient near 1e-5 times probabilities near 1e-4 vanishes in float16. So the
    forward differentiates loss / unit and the backward multiplies by unit, which is exact in
    binary. The 16 leaves float16 room for the sums of dW.
    """
    largest = pairs.row_weight.max() * (pairs.beta / pairs.count)
    if pairs.anchor is not None:
        largest = torch.maximum(largest, pairs.anchor.max())
    return torch.exp2(largest.log2().ceil() + 4)


def rescale(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrix * factor in a dtype; in place if that is the matrix's own.

    Multiplied in float32, where a factor in half precision would be off by 0.4 % or zero, and
    rounded once.
    """
    out = matrix if matrix.dtype == dtype else torch.empty_like(matrix, dtype=dtype)
    for rows, place in zip(matrix.split(4096), out.split(4096)):  # on a CPU, float32 copies of them
        torch.mul(rows, factor.view(1), out=place)  # a scalar would take on the matrix's dtype
    return out
