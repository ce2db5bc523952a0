"""Weights sharded over processes by PyTorch's FSDP2, and the sums of their gradients.

Each process holds some rows of every weight, gradient and optimizer state. FSDP gathers a group of
weights right before it is used, and frees it afterwards:

    attention, MLP, head    matrices: gathered in the dtype of products
    adapters of a block     LoRA's float32 matrices, separate from the bfloat16 base
    root                    embedding, all norms, projector: as they are stored
    (replicated)            the frozen vision tower; the scalar head of a reward model

FSDP reduce-scatters the gradients of its groups; `clip_gradients` all-reduces the others. With one
process nothing is sharded.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import parallel

if parallel.launched():
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard
else:  # importing them takes most of a second, and nothing is an instance of them
    DTensor = FSDPModule = ()


def clip_gradients(weights: Sequence[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a norm of at most `limit`, and return their norm before.

    Replicated gradients are summed over the processes first, as FSDP has summed the others.
    """
    if parallel.world() == 1:
        return nn.utils.clip_grad_norm_(weights, limit).item()
    squares, gradients = 0.0, [weight.grad for weight in weights if weight.grad is not None]
    for gradient in gradients:
        if not is_sharded(gradient):
            dist.all_reduce(gradient)
        if is_sharded(gradient) or parallel.rank() == 0:
            squares += local(gradient).float().square().sum()
    norm = math.sqrt(*parallel.total([squares]))
    for gradient in gradients:
        local(gradient).mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def shard(model: nn.Module) -> None:
    """Shard a LLaVA's weights by rows; they may be on the meta device."""
    for block in model.decoder.layers:
        group(block.self_attn)
        group(block.mlp)
    group(model.head)
    tower = set(model.vision_tower.parameters())
    group(model, gathered_dtype=None, ignored_params=tower)


def shard_adapter(model: nn.Module, name: str) -> None:
    """Shard an adapter in the same way, before the model's first forward pass."""
    for block in model.decoder.layers if parallel.world() > 1 else ():
        adapters = [module for path, module in block.named_modules()
                    if path.endswith(f".adapters.{name}")]
        if adapters:
            group(adapters)


def group(modules: nn.Module | list[nn.Module], **options) -> None:
    """Make the weights of modules one FSDP group, whose gradients are summed, not averaged."""
    dtype = options.pop("gathered_dtype", parallel.product_dtype())
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    fully_shard(
        modules, mesh=parallel.mesh(), reshard_after_forward=True, mp_policy=policy, **options)
    first = modules[0] if isinstance(modules, list) else modules
    first.set_gradient_divide_factor(1.0)
    first.set_force_sum_reduction_for_comms(True)


def is_sharded(weight: Tensor) -> bool:
    return isinstance(weight, DTensor)


def local(weight: Tensor) -> Tensor:
    """Return this process's part of a weight, in the same memory."""
    return weight.to_local() if is_sharded(weight) else weight


def whole(weight: Tensor) -> Tensor:
    """Return all of a weight, gathered from the processes, which must all call this."""
    return weight.full_tensor() if is_sharded(weight) else weight


def place(rows: Tensor, like: "DTensor") -> "DTensor":
    """Return this process's rows as a sharded tensor of the shape of another."""
    return DTensor.from_local(rows, parallel.mesh(), [Shard(0)], run_check=False,
                              shape=like.shape, stride=like.stride())


def cut(weight: Tensor, like: Tensor) -> Tensor:
    """Return a whole weight, or this process's rows of it where `like` is sharded."""
    if not is_sharded(like):
        return weight
    return place(weight[parallel.rows_of(len(weight))].clone(), like)


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy, which FSDP itself cannot make; a sharded model shares its tower."""
    if parallel.world() == 1:
        return copy.deepcopy(model)
    with torch.device("meta"):
        other = type(model)(model.config)
    shard(other)
    weights = {name: weight.clone() if is_sharded(weight) else weight
               for name, weight in model.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    other.decoder.gradient_checkpointing = model.decoder.gradient_checkpointing
    return other


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather a model's weights once, to decode without waiting for other processes."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
