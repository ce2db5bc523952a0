"""A: log p(target) without logits, for passes that need no gradient (Triton).

Reference scores, PPO's old log-probs and evaluation need one number per token. The logits never
leave the multiprocessors: one program computes one tile of them in registers and stores one
number per row, the tile's own log-sum-exp (`reference.py` derives why these can be joined).

                    V, tiles of 256
           +------+------+------+- - -+--+        one program:
           |      |      |      |     |//|
           | tile |      |      |     |//|          H tile (128, 64) --+
    R,     +------+------+------+- - -+--+                             +--> acc (128, 256), float32,
    tiles  |      |      |  t   |     |//|          W tile (256, 64) --+    in registers, summed
    of 128 |      |      |      |     |//|                                  over D in steps of 64
           +------+------+------+- - -+--+
           |//////////////////////////|//|        // past the end: loads repeat the last row or
           +------+------+------+- - -+--+        column or bring zeros, results are masked

    tile_lse[r, j]  = log sum over the tile's columns of exp(acc[r, :])     (R, V / 256) float32
    target_logit[r] = acc[r, t_r], written by the one tile whose columns hold t_r
    then            lse = logsumexp(tile_lse, dim=1),   log p = target_logit - lse

Every number has exactly one writer: no locks, no atomics, the same bits on every run. For
R = 6400 and V = 32064 the (R, 126) floats of tile_lse take 3 MB in place of 410 MB of logits.
The tiles follow one another in blocks of 8 row tiles (`tl.swizzle2d`), so that programs running
at the same time share rows of H and W in the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Shape of one program's tile and how it is compiled."""

    rows: int
    vocab: int
    width: int  # the step along D
    warps: int
    stages: int  # tiles of H and W in flight
    copied: bool  # by the GPU's copy engine, else by loads of its threads


def choose_tile(dtype: torch.dtype, capability: tuple[int, int], D: int) -> Tile:
    """Choose the tile for a dtype, a GPU generation and a width; none of them spills registers.

    * Hopper and data-centre Blackwell (9.x, 10.x): three stages of (128 + 256) x 64 half-precision
      numbers are 147 KB of the 227 KB of shared memory. With 4 warps the accumulator would spill.
    * Others: steps of 32 need a third of that, which consumer cards (99 KB) have as well.
    * From 9.0 on a copy engine brings whole tiles, zero past the end of the matrix, if rows begin
      at multiples of 16 bytes. On an H200 the threads' own loads took 1.2 times as long.
    * float32 passes through registers, and without the engine a D that is not a multiple of the
      step needs masks in the inner loop: smaller tiles.
    """
    step = 64 if capability[0] in (9, 10) else 32
    copied = dtype != torch.float32 and capability[0] >= 9 and D % 8 == 0
    if not copied and (dtype == torch.float32 or D % step):
        return Tile(64, 64, 32, warps=4, stages=3, copied=False)
    return Tile(128, 256, step, warps=8, stages=3, copied=copied)


@triton.jit(do_not_specialize=["R"])  # R differs in every batch: compile once, not per batch
def tile_logp_kernel(
    hidden, weight, target, tile_lse, target_logit, R, V, D,
    TILE_R: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
    COPIED: tl.constexpr, WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_tiles, vocab_tiles = tl.cdiv(R, TILE_R), tl.cdiv(V, TILE_V)
    program = tl.program_id(0)
    i, j = tl.swizzle2d(program // vocab_tiles, program % vocab_tiles, row_tiles, vocab_tiles, 8)
    row = i * TILE_R + tl.arange(0, TILE_R)
    column = j * TILE_V + tl.arange(0, TILE_V)
    depth = tl.arange(0, TILE_D)
    if COPIED:  # hidden and weight are descriptors, not pointers
        dtype: tl.constexpr = hidden.dtype
    else:  # 64-bit offsets: V * D passes 2^31 for a vocabulary of 256,000 and D = 8192
        dtype: tl.constexpr = hidden.dtype.element_ty
        h = hidden + tl.minimum(row, R - 1).to(tl.int64)[:, None] * D + depth[None, :]
        w = weight + tl.minimum(column, V - 1).to(tl.int64)[None, :] * D + depth[:, None]  # W^T

    acc = tl.zeros((TILE_R, TILE_V), dtype=tl.float32)
    for start in range(0, D, TILE_D):
        if COPIED:
            h_tile = hidden.load([i * TILE_R, start])
            w_tile = weight.load([j * TILE_V, start]).T
        elif WHOLE_D:  # D is a multiple of TILE_D: no mask in the inner loop
            h_tile, w_tile = tl.load(h), tl.load(w)
        else:
            h_tile = tl.load(h, mask=depth[None, :] < D - start, other=0.0)
            w_tile = tl.load(w, mask=depth[:, None] < D - start, other=0.0)
        acc = tl.dot(h_tile, w_tile, acc, input_precision=PRECISION)
        if not COPIED:
            h += TILE_D
            w += TILE_D

    acc = acc.to(dtype).to(tl.float32)  # rounded as the logits of B and C are: see fused.py
    acc = tl.where(column[None, :] < V, acc, float("-inf"))
    peak = tl.max(acc, axis=1)
    lse = peak + tl.log(tl.sum(tl.exp(acc - peak[:, None]), axis=1))
    tl.store(tile_lse + row.to(tl.int64) * vocab_tiles + j, lse, mask=row < R)

    wanted = tl.load(target + row, mask=row < R, other=-1)
    logit = tl.sum(tl.where(column[None, :] == wanted[:, None], acc, 0.0), axis=1)
    here = (wanted >= j * TILE_V) & (wanted < (j + 1) * TILE_V)  # false for rows past the end
    tl.store(target_logit + row, logit, mask=here)


def forward_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse, both (R,) float32, as `fused.logp_by_chunks` does.

    float32 products follow `torch.set_float32_matmul_precision`, as the library's matmuls do.
    """
    (R, D), V = hidden.shape, len(weight)
    device = hidden.device
    capability = torch.cuda.get_device_capability(device) if hidden.is_cuda else (9, 0)
    tile = choose_tile(hidden.dtype, capability, D)
    row_tiles, vocab_tiles = triton.cdiv(R, tile.rows), triton.cdiv(V, tile.vocab)
    tile_lse = torch.empty(R, vocab_tiles, dtype=torch.float32, device=device)
    target_logit = torch.empty(R, dtype=torch.float32, device=device)
    exact = torch.get_float32_matmul_precision() == "highest"
    if R:
        with torch.cuda.device_of(hidden):
            tile_logp_kernel[(row_tiles * vocab_tiles,)](
                *operands(hidden, weight, tile), target, tile_lse, target_logit, R, V, D,
                TILE_R=tile.rows, TILE_V=tile.vocab, TILE_D=tile.width, COPIED=tile.copied,
                WHOLE_D=D % tile.width == 0, PRECISION="ieee" if exact else "tf32",
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
    lse = tile_lse.logsumexp(dim=1)
    return target_logit - lse, lse


def operands(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple:
    """Return both as the kernel takes them: tensors, or descriptors of tensors and their tiles."""
    if not tile.copied:
        return hidden, weight
    sizes = (hidden, tile.rows), (weight, tile.vocab)
    aligned = ((x.clone() if x.data_ptr() % 16 else x, rows) for x, rows in sizes)
    return tuple(TensorDescriptor.from_tensor(x, [rows, tile.width]) for x, rows in aligned)
