"""What `--dry_run --gpus N` prints: the memory of each GPU, computed from meta tensors."""

from collections.abc import Iterable
from math import ceil

import torch
from torch import Tensor

from config import Training
from evaluation.preview import activation_bytes
from lora import add_adapter, select_trainable
from model import LLaVA, LLaVAConfig, TextConfig

TOKENS = 816  # of a row: an image of 576, a question of 40, two responses of 100
SHAPES = {  # LLaVA-1.5
    "7B": LLaVAConfig(),
    "13B": LLaVAConfig(text=TextConfig(hidden_size=5120, intermediate_size=13824,
                                       num_hidden_layers=40, num_attention_heads=40,
                                       num_key_value_heads=40)),
}


def memory_table(models: dict[str, LLaVAConfig], gpus: int, rank: int, config: Training) -> str:
    """Return the gigabytes per GPU of full training and of LoRA, lines for a terminal.

    Args:
        models: shapes by name.
        gpus: N, over which weights, gradients and optimizer are sharded.
        rank: of LoRA.
        config: gives the rows of a forward pass: a micro-batch, or a GPU's part of the batch.
    """
    rows = min(config.micro_batch, ceil(config.batch_size / gpus))
    lines = [
        f"Computed, not measured: gigabytes on each of {gpus} GPUs, {rows} rows of {TOKENS} tokens",
        "per forward pass, products in bfloat16, AdamW. CUDA itself takes 1 to 2 more. Full RL",
        "holds three models, with a critic four. Recomputing: with --gradient_checkpointing."]
    for name, shape in models.items():
        for lora in (0, rank):
            for recompute in (False, True):
                numbers = per_gpu(shape, gpus, lora, rows, recompute)
                if len(lines) == 3:
                    lines.append(" " * 24 + "".join(f"{column:>12}" for column in numbers))
                kind = f"{name} {f'LoRA {lora}' if lora else 'full'}{', recomputing' * recompute}"
                cells = [f"{number / 1e9:12.2f}" for number in numbers.values()]
                lines.append(f"{kind:<24}{''.join(cells)}")
    return "\n".join(lines)


def per_gpu(
    config: LLaVAConfig, gpus: int, lora: int, rows: int, recompute: bool
) -> dict[str, float]:
    """Return bytes by what they hold, and their sum."""
    with torch.device("meta"):
        model = LLaVA(config).to(torch.bfloat16 if lora else torch.float32)
    if lora:
        add_adapter(model, "default", lora, 16.0)
    trained = size(select_trainable(model, "default" if lora else None))
    tower = size(model.vision_tower.parameters())
    row = activation_bytes(config.text, TOKENS, 2, recompute, float32_norms=not lora)
    found = {
        "weights": tower + (size(model.parameters()) - tower) / gpus,
        "gradients": trained / gpus,
        "optimizer": 2 * trained / gpus,
        "whole": whole_bytes(model, gpus, trains_base=not lora),
        "activations": rows * row,
    }
    return found | {"in all": sum(found.values())}


def whole_bytes(model: LLaVA, gpus: int, trains_base: bool) -> int:
    """Return the bytes of copies of whole weights, at most.

    Several GPUs gather sharding.py's groups: the root as it is stored, and of the others two at a
    time in bfloat16. The largest one's gradient is in bfloat16, and in float32 while it is summed.
    One GPU keeps bfloat16 copies of all float32 matrices (autocast's).
    """
    parts = [part for block in model.decoder.layers for part in (block.self_attn, block.mlp)]
    parts.append(model.head)
    counts = [sum(w.numel() for w in part.parameters() if w.dtype == model.head.weight.dtype)
              for part in parts]
    if gpus == 1:
        return 2 * sum(counts) * trains_base
    grouped = {id(w) for part in (*parts, model.vision_tower) for w in part.parameters()}
    root = size(w for w in model.parameters() if id(w) not in grouped)
    return root * (1 + trains_base) + max(counts) * (2 * 2 + (2 + 4) * trains_base)


def size(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)
