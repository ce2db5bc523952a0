"""The vocabulary matrix at the end of a language model, without its logits in memory.

    token_logp(hidden, weight, target)             log p(target) per row, differentiable
    ddpo_loss(hidden, weight, target, ...)         the segment-weighted DDPO loss, fused

`model.Head` calls either as `function(hidden, weight, *arguments)`, with the weight gathered and in
the products' dtype, and accepts your own function in their place. `ddpo.py` computes its loss in
plain PyTorch from `token_logp`; `ddpo_loss` is tested equal to it.

Read `reference.py` first (the mathematics in plain PyTorch), then `fused.py` (how the work is cut),
then the Triton kernels. Both functions take the same two options, which only this file resolves:

* method, how the gradients are computed (`fused.py`): "chunks" (default, fastest) or "slices"
  (lowest memory). A pass without gradients needs neither: kernel A leaves no logits at all.
* backend, the code that computes the softmax: "triton" (default on a GPU where Triton is installed)
  or "torch" (everywhere else). The environment variable PLUMBLINE_KERNELS forces one.
  "triton" on CPU tensors needs TRITON_INTERPRET=1, set before Triton is imported.
"""

import importlib.util
import os

import torch
from torch import Tensor

from . import checks, fused, reference

METHODS, BACKENDS = ("chunks", "slices"), ("torch", "triton")


def token_logp(
    hidden: Tensor, weight: Tensor, target: Tensor,
    method: str | None = None, backend: str | None = None,
) -> Tensor:
    """Return the log-probabilities of given tokens.

    hidden: (R, D) hidden states, each of which predicts one token; float32, bfloat16 or float16.
    weight: (V, D) vocabulary matrix (`lm_head.weight`), same dtype. No gradient is computed for
        it where it does not require one (LoRA, a frozen head).
    target: (R,) long, the tokens.
    method, backend: see the top of this file; None takes the default.

    Returns (R,) float32 log-probabilities, differentiable once with respect to hidden and weight.
    Raises ValueError for shapes, dtypes or devices that disagree, a target outside the vocabulary,
    and log-probabilities that are not finite, with the hidden state or weight that is the cause.
    """
    method, ops = choose_method(method), choose_backend(backend, hidden)
    checks.check_tensors(hidden, weight, target=target)
    checks.check_values(target, len(weight))
    logp = fused.TokenLogp.apply(ops, method, *operands(hidden, weight, target))
    checks.check_results(logp.detach(), hidden, weight)
    return logp


def ddpo_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, segment_weight: Tensor, group: Tensor,
    reference: Tensor, beta: float, normalize: bool = True, anchor: float = 0.0,
    method: str | None = None, backend: str | None = None, bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the segment-weighted DPO loss of P pairs (RLHF-V, arXiv 2312.00849, Eq. 3 and 5).

    Equal to `ddpo.response_scores` and the mean of `ddpo.preference_loss` over `token_logp`, plus
    `ddpo.anchor_loss`.

    hidden, weight, target, method, backend: as in `token_logp`. A token that belongs to several
        responses (a shared beginning) is several rows.
    segment_weight: (R,) gamma in corrected segments and 1 elsewhere.
    group: (R,) long, in ascending order: the response of each row. Pair p is chosen = 2p and
        rejected = 2p + 1.
    reference: (2P,) the frozen model's scores of the responses, normalized alike.
    beta: above 0, in 1 / score; the paper's 0.5 with normalize=True.
    normalize: True divides a response's weighted sum by its sum of weights (Eq. 5); False leaves
        the sum (the paper's released code).
    anchor: at least 0, weight of the chosen responses' negative log-likelihood per token.
    bounds: (2P + 1,) the row where each response begins, and R, if the caller knows them. The call
        then waits for a GPU once, not twice, and leaves the values of target and group unchecked.

    Returns, all float32: the loss, a scalar, mean over pairs, differentiable once with respect to
    hidden and weight (the forward computes the gradients, the backward uses them up); rewards of
    the chosen and of the rejected responses, beta (score - reference), (P,) each; scores (2P,). The
    last three are for logging and carry no gradient.
    Raises ValueError like `token_logp`, and for empty responses, groups out of order or range, and
    a reference of odd length.
    """
    method, ops = choose_method(method), choose_backend(backend, hidden)
    checks.check_tensors(
        hidden, weight, reference, target=target, segment_weight=segment_weight, group=group)
    if reference.dim() != 1 or len(reference) % 2:
        raise ValueError(f"reference must be (2P,), a score per response: {tuple(reference.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not anchor >= 0:
        raise ValueError(f"anchor must not be below 0, got {anchor}")
    edges, bounds = checks.check_values(target, len(weight), group, len(reference), bounds)
    row_weight, reference = segment_weight.detach().float(), reference.detach().float()
    if normalize:
        sums = fused.segment_sum(row_weight, edges)  # (2P,), N of Eq. 5
        row_weight = row_weight / fused.spread(sums, edges, len(target))
    anchors = None
    if anchor:
        per_group = anchor * 2 / len(reference) / edges.diff()  # alpha / (P |y|)
        per_group[1::2] = 0
        anchors = fused.spread(per_group.float(), edges, len(target))
    pairs = fused.Pairs(row_weight, anchors, reference, edges, bounds, beta, len(reference) // 2)
    loss, rewards, scores, logp = fused.DDPOLoss.apply(
        ops, method, *operands(hidden, weight, target), pairs)
    checks.check_results(logp, hidden, weight)
    return loss, rewards[0::2], rewards[1::2], scores


def operands(*tensors: Tensor) -> list[Tensor]:
    """Return contiguous tensors, detached under no_grad, which autograd functions ignore."""
    tensors = [tensor.contiguous() for tensor in tensors]
    return tensors if torch.is_grad_enabled() else [tensor.detach() for tensor in tensors]


def choose_method(method: str | None) -> str:
    """Return the method, or the default for None."""
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    return method or "chunks"


def choose_backend(backend: str | None, hidden: Tensor) -> fused.Backend:
    """Return the backend of the argument, else of PLUMBLINE_KERNELS, else the device's default."""
    installed = importlib.util.find_spec("triton") is not None
    default = "triton" if hidden.is_cuda and installed else "torch"
    name = backend or os.environ.get("PLUMBLINE_KERNELS") or default
    if name not in BACKENDS:
        raise ValueError(f"the kernels' backend must be one of {BACKENDS}, got {name!r}")
    if name == "torch":
        return fused.Backend(reference.logp_rows, reference.gradient_rows_)
    if not installed:
        raise ValueError("the triton backend was requested but triton is not installed")
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton backend needs a GPU, hidden is on {hidden.device}: set TRITON_INTERPRET=1 "
            "before starting Python to run the kernels step by step on the CPU")
    from . import triton_forward, triton_rows  # optional: they import Triton

    rows = triton_rows.logp_rows, triton_rows.gradient_rows_
    return fused.Backend(*rows, triton_forward.forward_logp)
