"""Log-probabilities and the DDPO loss in plain PyTorch: the mathematics, readable first.

A language model turns a hidden state h (D numbers) into a distribution over V tokens:

    z_v = h . w_v                      logits, w_v = row v of the vocabulary matrix (V, D)
    p_v = exp(z_v) / sum_u exp(z_u)    softmax
    log p_t = z_t - lse,               lse = log sum_u exp(z_u)

Of 32,000 logits per token, two numbers are enough: z_t and lse. A batch of 32 preference pairs has
about R = 6,400 response tokens: its logits fill 410 MB in bfloat16, and the usual trainer holds
them several times over, in float32, for the prompt as well.

**Online softmax.** lse does not need all logits at once. With m the largest logit seen so far and
s = sum exp(z - m) over those seen, a further block of logits changes the pair (m, s) to

    m' = max(m, max of block)          s' = s exp(m - m') + sum over block of exp(z - m')

and lse = m + log s at the end. Nothing overflows, as no exponent is ever positive. The same
identity joins separately computed blocks: lse = log sum_b exp(lse_b).

**Gradient.** d log p_t / d z_v = [v = t] - p_v. For L = sum_r g_r log p_{t_r}, row r of the
gradient by logits is

    dz_r = (onehot(t_r) - p_r) g_r           and so     dH = dz W,     dW = dz^T H.

The softmax enters only as p_r = exp(z_r - lse_r): given lse, the gradient of any block of the
logits follows from that block alone.

**DDPO.** Equation 5 of RLHF-V (arXiv 2312.00849) scores a response by segment weights w_i, which
are gamma in corrected segments and 1 elsewhere:

    s = 1/N sum_i w_i log p_i,   N = sum_i w_i    (normalize=True; the paper's released code
                                                   takes the plain weighted sum, N = 1)

and compares chosen with rejected against the frozen reference scores, as DPO does (arXiv
2305.18290, Eq. 7). For P pairs:

    margin = beta ((s_c - ref_c) - (s_r - ref_r)),      L = 1/P sum_pairs -log sigmoid(margin)
    dL/ds_c = -beta sigmoid(-margin) / P = -dL/ds_r

A token of response k therefore has g_i = dL/ds_k w_i / N_k: one number per row, known as soon as
both responses of its pair are scored. This is why `fused.py` cuts the batch between pairs. The
anchor, -alpha / (P |y_c|) sum log p_i over each chosen response, adds -alpha / (P |y_c|) to its
g_i.

The first two functions compute this with autograd and full logits, in any precision; the tests
compare against them. The last two do the same work on a piece of the logits, as `fused.py` requires
of a backend; `triton_rows.py` has their twins on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return log p(target) with all logits in memory: (R, D), (V, D), (R,) -> (R,)."""
    logits = hidden @ weight.T  # (R, V)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)


def ddpo_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, segment_weight: Tensor, group: Tensor,
    reference: Tensor, beta: float, normalize: bool = True, anchor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `kernels.ddpo_loss`, by autograd over all logits."""
    logp = token_logp(hidden, weight, target)  # (R,)
    weight_sum = torch.zeros_like(reference).index_add(0, group, segment_weight)  # (G,)
    scores = torch.zeros_like(reference).index_add(0, group, segment_weight * logp)
    if normalize:
        scores = scores / weight_sum
    loss, rewards, _ = preference(scores, reference, beta, len(reference) // 2)
    sums = logp.new_zeros(len(reference)).index_add(0, group, logp)
    loss = loss - anchor * (sums / group.bincount())[0::2].mean()
    return loss, rewards[0::2], rewards[1::2], scores


def preference(
    scores: Tensor, reference: Tensor, beta: float, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the pairs in `scores`, as their part of the mean over `pairs` pairs.

    scores, reference: (G,), chosen at even and rejected at odd places.
    Returns the loss (a scalar), the rewards (G,) and dL/dscores (G,).
    """
    rewards = beta * (scores - reference)
    margin = rewards[0::2] - rewards[1::2]  # (G/2,)
    loss = -F.logsigmoid(margin).sum() / pairs
    push = torch.sigmoid(-margin) * (beta / pairs)  # near 0 once a pair is well apart
    return loss, rewards, torch.stack([-push, push], dim=1).flatten()


# The two functions of a backend -------------------------------------------------------------


def logp_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse, both (r,) float32, of logits (r, V)."""
    picked = logits.gather(1, target[:, None]).squeeze(1).float()
    lse = logits.float().logsumexp(dim=1)
    return picked - lse, lse


def gradient_rows_(logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Overwrite logits (r, v) with (onehot(target) - softmax) * scale, computed in float32.

    `logits` may be some of the vocabulary's columns; `target` counts from the first of them, and
    a target outside (negative, or >= v) has no onehot here. lse and scale: (r,) float32.
    """
    gradient = logits.float().sub_(lse[:, None]).exp_().neg_()  # in place if float32 already
    inside = (target >= 0) & (target < logits.shape[1])
    row = torch.arange(len(target), device=target.device)
    column = target.clamp(0, logits.shape[1] - 1)
    gradient[row, column] = gradient[row, column] + inside.float()  # each row once: no atomics
    return logits.copy_(gradient.mul_(scale[:, None]))
