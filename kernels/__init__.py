"""The vocabulary matrix at the end of a language model, without its logits in memory.

    token_logp(hidden, weight, target)             log p(target) per row, differentiable
    ddpo_loss(hidden, weight, target, ...)         the segment-weighted DDPO loss, fused

Read `reference.py` first (the mathematics in plain PyTorch), then `fused.py` (how the work is cut),
then the Triton kernels. Both functions take the same two choices, made here and nowhere else:

* method, how the gradients are computed (`fused.py`): "chunks" (default, fastest) or "slices"
  (lowest memory). A pass without gradients takes neither: kernel A leaves no logits at all.
* backend, who does the softmax: "triton" (default on a GPU where Triton is installed) or "torch"
  (everywhere else). The environment variable PLUMBLINE_KERNELS forces one.
  "triton" on CPU tensors needs TRITON_INTERPRET=1, set before Triton is imported.
"""

import importlib.util
import os

import torch
from torch import Tensor

from . import checks, fused, reference

METHODS, BACKENDS = ("chunks", "slices"), ("torch", "triton")


def token_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    method: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities of given tokens.

    hidden: (R, D) hidden states that predict a token each; float32, bfloat16 or float16.
    weight: (V, D) vocabulary matrix (`lm_head.weight`), same dtype. No gradient is computed for
        it where it does not require one (LoRA, a frozen head).
    target: (R,) long, the tokens.

    Returns (R,) float32 natural-log probabilities, differentiable once by hidden and weight.
    Raises ValueError for shapes, dtypes or devices that disagree, a target outside the vocabulary,
    and hidden states or weights that are not finite.
    """
    method = choose_method(method)
    checks.check_head(hidden, weight, target)
    ops = choose_backend(backend, hidden)
    checks.check_targets(target, len(weight))
    needs = gradients_needed(hidden, weight)
    hidden, weight, target = hidden.contiguous(), weight.contiguous(), target.contiguous()
    logp = fused.TokenLogp.apply(ops, method, hidden, weight, target, needs)
    checks.check_results(logp.detach(), hidden, weight)
    return logp


def ddpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segment_weight: Tensor,
    group: Tensor,
    reference: Tensor,
    beta: float,
    normalize: bool = True,
    method: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segment-weighted DPO loss of P pairs (RLHF-V, arXiv 2312.00849, Eq. 3 and 5).

    hidden, weight, target: as in `token_logp`. A token that belongs to several responses (a shared
        beginning) is several rows.
    segment_weight: (R,) floating point, gamma in corrected segments and 1 elsewhere.
    group: (R,) long, never falling: the response of each row. Pair p is chosen = 2p and
        rejected = 2p + 1.
    reference: (2P,) floating point, the frozen model's scores of the responses, normalized alike.
    beta: above 0, in 1 / score; the paper's 0.5 with normalize=True.
    normalize: True divides a response's weighted sum by its sum of weights (Eq. 5); False leaves
        the sum (the paper's released code).

    Returns, all float32: the loss, a scalar, mean over pairs, differentiable by hidden and weight
    (once: its gradients are made in the forward and used up by backward); rewards of the chosen
    and of the rejected responses, beta (score - reference), (P,) each; scores (2P,). The last
    three are for logging and carry no gradient.
    Raises ValueError as `token_logp`, and for empty responses, segment weights that are negative or
    sum to zero, groups out of order or range, and a reference of the wrong length.
    """
    method = choose_method(method)
    checks.check_head(hidden, weight, target)
    checks.check_pairs(hidden, segment_weight, group, reference, beta)
    ops = choose_backend(backend, hidden)
    segment_weight, reference = segment_weight.detach().float(), reference.detach().float()
    edges, bounds = checks.check_values(target, len(weight), segment_weight, group, reference)
    row_weight = segment_weight
    if normalize:
        sums = fused.segment_sum(segment_weight, edges)  # (2P,), N of Eq. 5
        row_weight = segment_weight / fused.spread(sums, edges, len(target))
    pairs = fused.Pairs(row_weight, reference, edges, bounds, beta)
    needs = gradients_needed(hidden, weight)
    hidden, weight, target = hidden.contiguous(), weight.contiguous(), target.contiguous()
    loss, rewards, scores, logp = fused.DDPOLoss.apply(
        ops, method, hidden, weight, target, pairs, needs
    )
    checks.check_results(logp, hidden, weight)
    return loss, rewards[0::2], rewards[1::2], scores


def gradients_needed(*tensors: Tensor) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)


def choose_method(method: str | None) -> str:
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    return method or "chunks"


def choose_backend(backend: str | None, hidden: Tensor) -> fused.Backend:
    """The argument, else the environment, else what suits the device."""
    name = backend or os.environ.get("PLUMBLINE_KERNELS")
    if name not in (None, "", *BACKENDS):
        raise ValueError(f"the kernels' backend must be one of {BACKENDS}, got {name!r}")
    installed = importlib.util.find_spec("triton") is not None
    if not name:
        name = "triton" if hidden.is_cuda and installed else "torch"
    if name == "torch":
        return fused.Backend(reference.logp_rows, reference.gradient_rows_)
    if not installed:
        raise ValueError("the triton backend was asked for and triton is not installed")
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton backend needs a GPU, hidden is on {hidden.device}: set TRITON_INTERPRET=1 "
            "before starting Python to run the kernels step by step on the CPU"
        )
    from . import triton_forward, triton_rows  # here, as a machine may be without Triton

    return fused.Backend(
        triton_rows.logp_rows, triton_rows.gradient_rows_, triton_forward.forward_logp
    )
