"""LoRA: named low-rank adapters over frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

Several adapters can share one base: with `--lora`, PPO's policy, reward model and critic (if any)
are adapters, the reference is the base itself, and memory holds the base once.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharding

# All linear layers of a decoder block.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A low-rank update B A x * alpha / rank (Hu et al. 2021); B and so the update start at 0."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator=None):
        super().__init__()
        device = base.weight.device
        start = torch.empty(rank, base.in_features)  # drawn on the CPU: the same on every device
        nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.rank, self.alpha = rank, alpha

    def delta(self) -> Tensor:  # (out, in)
        return sharding.whole(self.B) @ sharding.whole(self.A) * (self.alpha / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        # A and B are trained in float32 but multiplied in the activations' dtype: float32 products
        # beside a bfloat16 base would cost more than the base's own.
        low = F.linear(x, self.A.to(x.dtype)) * (self.alpha / self.rank)  # (..., rank)
        return F.linear(low, self.B.to(x.dtype))


class LoRALinear(nn.Linear):
    """nn.Linear with any number of named adapters, of which one or none is active."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.active is not None:
            y = y + self.adapters[self.active](x)
        return y

    def merged(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in) plus one adapter's update, summed in float32."""
        weight = sharding.whole(self.weight)
        return (weight.float() + self.adapters[name].delta()).to(dtype or weight.dtype)


def add_adapter(
    model: nn.Module, name: str, rank: int, alpha: float,
    targets: Iterable[str] = LORA_TARGETS, seed: int = 0,
) -> None:
    """Give the decoder's linear layers a named adapter; it changes nothing until trained and used.

    Args:
        rank, alpha: the update is B A * alpha / rank, with A of `rank` rows.
        targets: last parts of module names, or whole names.
        seed: decides the random start of A; B starts at zero.

    Raises:
        ValueError: no such layer, or the name is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        module for path, module in model.named_modules()
        if isinstance(module, LoRALinear) and any(f".{path}".endswith(f".{t}") for t in targets)
    ]
    if not chosen:
        raise ValueError(f"no linear layer of the decoder is called {' or '.join(targets)}")
    for module in chosen:
        if name in module.adapters:
            raise ValueError(f"the model has an adapter named {name!r} already")
        module.adapters[name] = LoRA(module, rank, alpha, generator)


def lora_layers(model: nn.Module, name: str) -> list[LoRALinear]:
    """Return the linear layers that carry an adapter; ValueError if none does."""
    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    found = [module for module in linears if name in module.adapters]
    if not found:
        known = sorted({known for module in linears for known in module.adapters})
        raise ValueError(f"no adapter named {name!r}; there are: {', '.join(known) or 'none'}")
    return found


def merge_adapter(model: nn.Module, name: str) -> None:
    """Add an adapter's update to the weights below it, and remove the adapter."""
    for module in lora_layers(model, name):
        weight = sharding.cut(module.merged(name).detach(), module.weight)
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
        del module.adapters[name]


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with one adapter, or with none (None); then restore the one active before."""
    chosen = set(lora_layers(model, name)) if name is not None else set()
    before = [(m, m.active) for m in model.modules() if isinstance(m, LoRALinear)]
    for module, _ in before:
        module.active = name if module in chosen else None
    try:
        yield
    finally:
        for module, active in before:
            module.active = active


def same_adapter(block: nn.Module):
    """Make `torch.utils.checkpoint` recompute with the adapter that was active in forward.

    The backward pass usually runs after the `use_adapter` block has ended. Without this it would
    recompute with the adapter that is active by then, and the gradients would silently be wrong.
    """
    name = next((m.active for m in block.modules() if isinstance(m, LoRALinear) and m.active), None)
    return lambda: (contextlib.nullcontext(), use_adapter(block, name))


def select_trainable(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """Freeze all weights except those to train, and return these.

    Args:
        adapter: train this adapter alone; None trains the base: decoder, head and projector. The
            vision tower is always frozen.
    """
    for path, weight in model.named_parameters():
        if adapter is None:
            trained = ".adapters." not in path and not path.startswith("vision_tower.")
        else:
            trained = f".adapters.{adapter}." in path
        weight.requires_grad_(trained)
    return [weight for weight in model.parameters() if weight.requires_grad]
