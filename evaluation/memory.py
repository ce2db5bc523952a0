"""Memory estimates that `--dry_run` prints: of a run, and with `--gpus N` of each GPU."""

from collections.abc import Iterable, Sequence
from itertools import product
from math import ceil

import torch
from torch import Tensor

from config import Training
from data import Example, row_length
from formats import features
from lora import add_adapter, select_trainable
from model import LLaVA, LLaVAConfig, TextConfig

TOKENS = 816  # of a row: an image of 576, a question of 40, two responses of 100
SHAPES = {  # LLaVA-1.5
    "7B": LLaVAConfig(),
    "13B": LLaVAConfig(text=TextConfig(hidden_size=5120, intermediate_size=13824,
                                       num_hidden_layers=40, num_attention_heads=40,
                                       num_key_value_heads=40)),
}


def memory_estimate(
    model: LLaVA, config: Training, examples: Sequence[Example], named: features.Named,
    itemsize: int,
) -> str:
    """Return the memory that a run takes, one item per line.

    Args:
        model: its trainable parameters are already selected.
        named: names and images of the rows, for the features.
        itemsize: bytes of a number in computation.
    """
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    count = lambda of: sum(weight.numel() for weight in of)
    longest, rows = max(map(row_length, examples)), min(config.micro_batch, config.batch_size)
    checkpointing = model.decoder.gradient_checkpointing
    float32 = itemsize < model.head.weight.element_size()
    row = activation_bytes(model.config.text, longest, itemsize, checkpointing, float32)
    images, patches, width = features.size(model, named)
    stored = images * patches * width * itemsize
    where = "in memory" if stored <= features.LIMIT else "in a file in the run's folder"
    return f"""\
parameters   {count(weights):,}, of which {count(trained):,} are trained
weights      {readable(size(weights))}
gradients    {readable(size(trained))}
optimizer    {readable(2 * size(trained))} (AdamW: two averages of every gradient)
activations  {readable(row)} for the longest row of {longest} tokens, {readable(row * rows)} for a \
micro-batch of {rows} of them (estimated: what the decoder keeps{", checkpointed" * checkpointing})
features     {readable(stored)} for {images} images, {where}"""


def activation_bytes(
    config: TextConfig, tokens: int, itemsize: int, checkpointing: bool, float32_norms: bool = False
) -> int:
    """Estimate the bytes that the decoder keeps of one row for the backward pass, by counting.

    Per token and block: input and output of both norms (4 D); queries, keys and values (D + 2 KV);
    the attention's output (D); gate, up, and their product (3 I). Gradient checkpointing keeps the
    block's input (D) and recomputes one block at a time. Once per token: the last norm's input (D),
    and the rotary cosines and sines.

    Args:
        float32_norms: half-precision products over float32 weights (autocast): the norms' inputs
            are float32, and each of the five products of their outputs keeps its own copy.
    """
    width, inner = config.hidden_size, config.intermediate_size
    state = width * (4 if float32_norms else itemsize)  # bytes of a block's input
    products = (7 if float32_norms else 4) * width + 3 * inner
    products += 2 * config.num_key_value_heads * config.head_dim
    block = 2 * state + itemsize * products
    blocks = config.num_hidden_layers * (state if checkpointing else block)
    once = state + itemsize * 2 * config.head_dim + (block if checkpointing else 0)
    return tokens * (blocks + once)


def readable(number: float) -> str:
    """Format a number of bytes."""
    if number < 1000:
        return f"{number} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        number /= 1000
        if round(number) < 1000:
            break
    return f"{number:.3g} {unit}"


def size(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


# ------------------------------------------------------------------------------------ several GPUs


def memory_table(models: dict[str, LLaVAConfig], gpus: int, rank: int, config: Training) -> str:
    """Return the gigabytes per GPU of full training and of LoRA, lines for a terminal.

    Args:
        models: shapes by name.
        gpus: N, over which weights, gradients and optimizer are sharded.
        rank: of LoRA.
        config: gives the rows of a forward pass: a micro-batch, or a GPU's part of the batch.
    """
    rows = min(config.micro_batch, ceil(config.batch_size / gpus))
    lines = []
    for (name, shape), lora, recompute in product(models.items(), (0, rank), (False, True)):
        kind = f"{name} {f'LoRA {lora}' if lora else 'full'}{', recomputing' * recompute}"
        numbers = per_gpu(shape, gpus, lora, rows, recompute)
        lines.append(f"{kind:<24}" + "".join(f"{each / 1e9:12.2f}" for each in numbers.values()))
    head = " " * 24 + "".join(f"{column:>12}" for column in numbers)
    return "\n".join([
        f"Computed, not measured: gigabytes on each of {gpus} GPUs, {rows} rows of {TOKENS} tokens",
        "per forward pass, products in bfloat16, AdamW. CUDA itself takes 1 to 2 more. Full RL",
        "holds three models, with a critic four. Recomputing: with --gradient_checkpointing.",
        head, *lines])


def per_gpu(
    config: LLaVAConfig, gpus: int, lora: int, rows: int, recompute: bool
) -> dict[str, float]:
    """Return the bytes on each GPU, by purpose, and their sum."""
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
    """Return an upper bound on the bytes of copies of whole weights.

    Several GPUs gather sharding.py's groups: the root as it is stored, the others two at a time in
    bfloat16. The largest one's gradient is in bfloat16, and in float32 while it is summed. One GPU
    keeps autocast's bfloat16 copies of all float32 matrices.
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
