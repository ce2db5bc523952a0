"""B and C: gradients through the vocabulary matrix, a piece of the logits at a time.

Both end with exact gradients and never hold the (R, V) logits; they cut them the other way round.
`reference.py` derives the formulas. One product costs 2 R V D FLOPs; the least a training step
can do is three (z = H W^T, dH = dz W, dW = dz^T H), which `bench.py` calls the matmul floor.

    B "chunks": across rows                      C "slices": across the vocabulary

            V                                        V = slices of at least 1024
        +-----------------------+                    +-----+-----+-----+-----+
     R  |  pairs 0..9           | chunk 0        R   |     |     |     |     |
        +-----------------------+                    |  0  |  1  |  2  | ... |
        |  pairs 10..18         | chunk 1            |     |     |     |     |
        +-----------------------+                    +-----+-----+-----+-----+
        |  pairs 19..31         | chunk 2
        +-----------------------+

B holds one chunk of logits, turns it into dz in place, writes dH of those rows and adds to dW,
which is summed in float32 over the chunks. For the DDPO loss a chunk holds whole pairs: both
scores of a pair, and with them every row's coefficient, are known before the chunk is left. So
the gradients are computed in the forward, at the floor's 3 products (`token_logp` learns its
coefficients in the backward only and computes the chunk again: 4).

C takes lse from a first pass that keeps no logits (kernel A), computes each slice of logits again,
writes that slice of dW once, in its final precision, and adds to dH in float32: 4 products, no
(V, D) accumulator. Memory beside inputs and gradients, at R = 6400, V = 32064, D = 4096, bfloat16:

                B                                          C
    logits      ~2090 rows x V           134 MB            R x 2560            33 MB
    sums        dW, float32              525 MB            dH, float32        105 MB
                (none if the head is frozen or one
                chunk holds all rows)

Logits are rounded to the precision of the hidden states before the softmax, as a model's own head
does, and in A, B and C alike: a policy equal to its reference scores the same, and lse fits the
logits that the backward computes again (where p is near 1, onehot - p is the difference of two
roundings) - but for the rare logit whose rounding turns on the order of a sum. Softmax, scores,
coefficients and all sums over chunks are float32.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import preference

# Logits held at a time. On a GPU large enough for full-speed products; on a CPU (16 MB in float32)
# larger ones are no faster.
CHUNK_ELEMENTS = {"cuda": 2**26, "cpu": 2**22}  # B
SLICE_ELEMENTS = {"cuda": 2**24, "cpu": 2**22}  # C
SLICE_LEAST = 1024  # C: a narrower slice leaves the matmul too little work per row of W


class Backend(NamedTuple):
    """Who does the softmax; see `reference.py` for what each function returns."""

    logp_rows: Callable
    gradient_rows_: Callable
    forward_logp: Callable | None = None  # kernel A; without one, chunks of logits do its work


class TokenLogp(torch.autograd.Function):
    """log p(target) (R,) float32, whose gradient computes the logits again piece by piece."""

    @staticmethod
    def forward(ctx, backend, method, hidden, weight, target, needs):
        # B computes the very logits that its backward will meet again, to the last bit.
        compute = logp_by_chunks if method == "chunks" and any(needs) else logp_without_logits
        logp, lse = compute(backend, hidden, weight, target)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.backend, ctx.method = backend, method
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        backward = by_chunks if ctx.method == "chunks" else by_slices
        gradients = backward(
            ctx.backend, *ctx.saved_tensors, scale.float().contiguous(), ctx.needs_input_grad[2:4]
        )
        return None, None, *gradients, None, None


class Pairs(NamedTuple):
    """What a batch of preference pairs knows beside its tokens; pair p is groups 2p and 2p + 1."""

    row_weight: Tensor  # (R,) float32, w_i / N_k of Eq. 5
    reference: Tensor  # (G,) float32, the frozen model's scores
    edges: Tensor  # (G + 1,) long: group k holds rows edges[k] to edges[k + 1]
    bounds: list[int]  # edges, known to the host
    beta: float


class DDPOLoss(torch.autograd.Function):
    """DDPO loss, rewards (G,), scores (G,) and log-probs (R,); gradients made in the forward."""

    @staticmethod
    def forward(ctx, backend, method, hidden, weight, target, pairs, needs):
        unit = gradient_unit(pairs)
        # Without gradients there is no second use for the logits: the pass of C keeps none.
        compute = ddpo_by_chunks if method == "chunks" and any(needs) else ddpo_by_slices
        results, ctx.gradients = compute(backend, hidden, weight, target, pairs, unit, needs)
        ctx.unit, ctx.dtype = unit, weight.dtype
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through ddpo_loss a second time: the first one used up its gradients, "
                "which are scaled in place to save memory; call ddpo_loss again"
            )
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                scale_(gradient, grad_loss * ctx.unit)
        if d_weight is not None:
            d_weight = d_weight.to(ctx.dtype)
        return None, None, d_hidden, d_weight, None, None, None


# B ------------------------------------------------------------------------------------------


def ddpo_by_chunks(backend, hidden, weight, target, pairs, unit, needs):
    """(loss, rewards, scores, log-probs), and (dH, dW) of loss / unit, in one pass."""
    bounds = pairs.bounds
    chunks = pair_chunks(bounds, chunk_rows(weight))
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = new_weight_gradient(weight, len(chunks)) if needs[1] else None
    longest = max(bounds[last] - bounds[first] for first, last in chunks)
    buffer = logits_buffer(longest, len(weight), hidden)
    parts = []
    for first, last in chunks:
        rows, edges = slice(bounds[first], bounds[last]), pairs.edges[first : last + 1]
        logits = torch.mm(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        logp, lse = backend.logp_rows(logits, target[rows])
        row_weight = pairs.row_weight[rows]
        scores = segment_sum(logp * row_weight, edges - rows.start)
        loss, rewards, slope = preference(
            scores, pairs.reference[first:last], pairs.beta, len(pairs.reference) // 2
        )
        parts.append((loss[None], rewards, scores, logp))
        scale = spread(slope / unit, edges, len(logp)) * row_weight
        backend.gradient_rows_(logits, lse, target[rows], scale)
        accumulate(logits, hidden, weight, rows, d_hidden, d_weight)
    losses, *rest = (torch.cat(column) for column in zip(*parts))
    return (losses.sum(), *rest), (d_hidden, d_weight)


def logp_by_chunks(backend, hidden, weight, target):
    """log p(target) and lse, both (R,) float32."""
    logp = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(logp)
    for rows, logits in row_chunks(hidden, weight):
        logp[rows], lse[rows] = backend.logp_rows(logits, target[rows])
    return logp, lse


def by_chunks(backend, hidden, weight, target, lse, scale, needs):
    """dH and dW for given row coefficients `scale`, computing the logits again."""
    chunks = -(-len(target) // chunk_rows(weight))
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = new_weight_gradient(weight, chunks) if needs[1] else None
    for rows, logits in row_chunks(hidden, weight):
        backend.gradient_rows_(logits, lse[rows], target[rows], scale[rows])
        accumulate(logits, hidden, weight, rows, d_hidden, d_weight)
    return d_hidden, None if d_weight is None else d_weight.to(weight.dtype)


def row_chunks(hidden, weight):
    """Yields (rows, their logits), each in the memory of the one before."""
    R, step = len(hidden), chunk_rows(weight)
    buffer = logits_buffer(min(step, R), len(weight), hidden)
    for start in range(0, R, step):
        rows = slice(start, min(start + step, R))
        yield rows, torch.mm(hidden[rows], weight.T, out=buffer[: rows.stop - start])


def accumulate(gradient, hidden, weight, rows, d_hidden, d_weight):
    """dH of these rows; their part of dW. gradient: dz (r, V). Either result may be None."""
    if d_hidden is not None:
        torch.mm(gradient, weight, out=d_hidden[rows])
    if d_weight is not None:
        add_product_(d_weight, gradient.T, hidden[rows], first=rows.start == 0)


def chunk_rows(weight: Tensor) -> int:
    """Rows of logits in a chunk."""
    return max(1, CHUNK_ELEMENTS["cuda" if weight.is_cuda else "cpu"] // len(weight))


def pair_chunks(bounds: list[int], most_rows: int) -> list[tuple[int, int]]:
    """Groups cut between pairs into (first, last) of at most `most_rows` rows, or one pair."""
    chunks, first = [], 0
    for pair in range(0, len(bounds) - 1, 2):
        if pair > first and bounds[pair + 2] - bounds[first] > most_rows:
            chunks.append((first, pair))
            first = pair
    return [*chunks, (first, len(bounds) - 1)]


def new_weight_gradient(weight: Tensor, chunks: int) -> Tensor:
    """dW before the first chunk: summed over several in float32, written by a single one directly,
    zero without any."""
    new = torch.empty_like if chunks else torch.zeros_like
    return new(weight, dtype=weight.dtype if chunks <= 1 else torch.float32)


# C ------------------------------------------------------------------------------------------


def ddpo_by_slices(backend, hidden, weight, target, pairs, unit, needs):
    """As ddpo_by_chunks: all scores first, from a pass that keeps no logits, then the gradients."""
    logp, lse = logp_without_logits(backend, hidden, weight, target)
    scores = segment_sum(logp * pairs.row_weight, pairs.edges)
    loss, rewards, slope = preference(
        scores, pairs.reference, pairs.beta, len(pairs.reference) // 2
    )
    scale = spread(slope / unit, pairs.edges, len(logp)) * pairs.row_weight
    gradients = by_slices(backend, hidden, weight, target, lse, scale, needs)
    return (loss, rewards, scores, logp), gradients


def logp_without_logits(backend, hidden, weight, target):
    """log p(target) and lse, both (R,) float32: kernel A, or chunks where there is none."""
    if backend.forward_logp:
        return backend.forward_logp(hidden, weight, target)
    return logp_by_chunks(backend, hidden, weight, target)


def by_slices(backend, hidden, weight, target, lse, scale, needs):
    """dH and dW for given row coefficients `scale`, a slice of the vocabulary at a time."""
    V, step = len(weight), slice_columns(hidden)
    d_hidden = torch.empty_like(hidden, dtype=torch.float32) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    buffer = logits_buffer(len(hidden), min(step, V), hidden)
    for start in range(0, V, step) if any(needs) else ():
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
    """Columns of logits in a slice, a multiple of 256."""
    budget = SLICE_ELEMENTS["cuda" if hidden.is_cuda else "cpu"]
    return max(SLICE_LEAST, budget // max(len(hidden), 1) // 256 * 256)


# Shared pieces ------------------------------------------------------------------------------


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns), unwritten. Rows start at multiples of 64 numbers: tensor cores and wide
    loads want aligned rows, also where the vocabulary is 32,003.

    The padding is zero because a matmul may read it: oneDNN's AMX kernels (torch 2.13, bfloat16
    and float16) multiply what lies past the end of a row by zero, and NaN times zero is NaN."""
    padded = -(-columns // 64) * 64
    buffer = torch.empty(rows, padded, dtype=like.dtype, device=like.device)
    buffer[:, columns:] = 0
    return buffer[:, :columns]


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, summed in float32 whatever a and b are; `first` overwrites instead.

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
    """Sums of values (R,) between consecutive edges (G + 1,), in a fixed order (index_add's is
    not on a GPU)."""
    return torch.segment_reduce(values, "sum", offsets=edges, initial=0.0, unsafe=True)


def spread(per_group: Tensor, edges: Tensor, rows: int) -> Tensor:
    """per_group (G,) repeated for every row between the group's edges -> (rows,)."""
    return per_group.repeat_interleave(edges.diff(), output_size=rows)


def gradient_unit(pairs: Pairs) -> Tensor:
    """A power of two above 16 times the largest row coefficient, beta row_weight / (G / 2).

    The gradients are computed before the backward says by what they are multiplied (a loss scale,
    1 / accumulation steps), and a coefficient near 1e-5 times probabilities near 1e-4 vanishes in
    float16. So the forward differentiates loss / unit and the backward multiplies by unit, which
    is exact in binary. The 16 leaves float16 room for the sums of dW.
    """
    largest = pairs.row_weight.max() * (pairs.beta / (len(pairs.reference) // 2))
    return torch.exp2(largest.log2().ceil() + 4)


def scale_(matrix: Tensor, factor: Tensor) -> None:
    """matrix *= factor in place, multiplied in float32: a factor rounded to the matrix's own
    half precision would be off by 0.4 %, or zero."""
    for rows in matrix.split(4096):
        rows.copy_(rows.float() * factor)
