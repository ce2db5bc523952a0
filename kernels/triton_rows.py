"""The softmax half of B and C (Triton): logits to log-probs, and to their gradient in place.

Training uses the logits twice more, as dz in dH = dz W and dW = dz^T H. The library computes these
matrix products; the two kernels here do the work between them. They are bound by memory, so they
read the logits only twice and write them once:

    logits (r, V)   +----------------------------------+
    row 0           |  block 0 | block 1 | ...  |  ////|  logp_rows: one program per row walks
    row 1           |          |   t     |      |  ////|  the blocks with the online softmax
                    +----------------------------------+

    dz (r, V)       +----------+---------+------+------+
    same memory     | program  | program |      |      |  gradient_rows_: one program per block,
                    | (0, 0)   | (0, 1)  |      |      |  dz = (onehot(t) - exp(z - lse)) * scale
                    +----------+---------+------+------+

`reference.py` has the derivation and the plain twins of both functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
OPTIONS = dict(num_warps=8, enable_fp_fusion=True)  # 16 numbers per thread; z * a + b in one step


@triton.jit
def logp_rows_kernel(logits, target, logp, lse, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    column = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits + start + column, mask=column < V - start, other=float("-inf"))
        z = z.to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(z - new_peak), axis=0)
        peak = new_peak
    value = peak + tl.log(total)
    tl.store(lse + row, value)
    tl.store(logp + row, tl.load(logits + tl.load(target + row)).to(tl.float32) - value)


@triton.jit
def gradient_rows_kernel(logits, lse, target, scale, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    z = tl.load(logits + column, mask=column < V).to(tl.float32)
    onehot = tl.where(column == tl.load(target + row), 1.0, 0.0)
    gradient = (onehot - tl.exp(z - tl.load(lse + row))) * tl.load(scale + row)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def logp_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse, (r,) float32 each, of logits (r, V) contiguous along V."""
    r, V = logits.shape
    logp = torch.empty(r, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logp)
    with torch.cuda.device_of(logits):
        logp_rows_kernel[(r,)](
            logits, target, logp, lse, logits.stride(0), V, BLOCK=BLOCK, **OPTIONS)
    return logp, lse


def gradient_rows_(logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Overwrite logits with (onehot - softmax) * scale; see `reference.gradient_rows_`."""
    r, V = logits.shape
    with torch.cuda.device_of(logits):
        gradient_rows_kernel[(r, triton.cdiv(V, BLOCK))](
            logits, lse, target, scale, logits.stride(0), V, BLOCK=BLOCK, **OPTIONS)
    return logits
