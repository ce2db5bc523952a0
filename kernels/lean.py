"""RMSNorm and SwiGLU's product, keeping less for the backward pass than autograd would.

Without gradients, as in decoding, the custom functions are bypassed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def inverse_size(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps), (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


class Normalise(torch.autograd.Function):
    """x * weight / sqrt(mean(x^2) + eps), keeping x and one number per token for backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_size(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        along = gradient * unit
        by_weight = along.flatten(0, -2).sum(0)
        along = (along @ weight).div_(-x.shape[-1]).unsqueeze(-1)  # (..., 1)
        return unit.mul_(along).addcmul_(gradient, weight).mul_(scale), by_weight, None


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, but with `Normalise` on a CPU, where torch keeps a second copy of x."""

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.eps
        if not (x.is_cpu and x.dtype == weight.dtype == torch.float32):
            return super().forward(x)
        if torch.is_grad_enabled():
            return Normalise.apply(x, weight, eps)
        return (x * inverse_size(x, eps)).mul_(weight)


class GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, recomputing silu(gate) in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, F.silu(gate).mul_(gradient)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, SwiGLU's product (arXiv 2002.05202)."""
    if torch.is_grad_enabled():
        return GatedSiLU.apply(gate, up)
    return F.silu(gate).mul_(up)
