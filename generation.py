"""Answers from the model: a prompt is read once, and its samples are decoded as branches of it.

The keys and values of a batch lie in buffers of fixed size, a slot per token:

    slot      0 .. width - 1      width, +1, ..       ..                       .. slots - 1
              prompt (trunk)      step 0: sample 1..k | step 1: sample 1..k |  ..  | unused

and a mask (rows, 1, samples, slots), added to the attention scores, says which sample may look at
which slot: the prompt's from the start, its own new ones as they are filled. A step so changes
nothing but values in memory that stays where it is. Run plainly it looks at the filled slots only;
compiled, at all of them, so that no shape changes and CUDA graphs can replay the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model import KVCache, LLaVA

SLOTS = 64  # buffers are multiples of this, so that prompts of like length share a compiled step
CHECK_EVERY = 16  # steps on a GPU between questions whether all are done: each waits for the device


@dataclass
class Decoding:
    """The rows still being answered, and where their next tokens go."""

    row: Tensor  # (n,) which prompt
    finished: Tensor  # (n, samples) bool
    position: Tensor  # (n, samples) of the newest token
    slots: Tensor  # (samples,) where its keys and values go
    mask: Tensor  # (n, 1, samples, slots), 0 or -inf
    cache: KVCache

    def keep(self, alive: Tensor) -> None:
        """Forget the rows that are answered; alive: (n,) bool."""
        for name in ("row", "finished", "position", "mask"):
            setattr(self, name, getattr(self, name)[alive])
        self.cache.keep(alive)


@torch.inference_mode()
def generate(
    model: LLaVA,
    images: Tensor | None,
    prompts: list[Tensor],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    compiled: bool = False,
) -> list[Tensor]:
    """Answers to a batch of prompts: each prompt is read once, its samples are branches of it.

    Args:
        images: as for `LLaVA.embed`, for those prompts that have an image, in order.
        prompts: 1-D token tensors, image tokens expanded.
        max_new_tokens: answers are cut off here; a whole answer ends with end-of-sequence.
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / t).
        samples: answers per prompt.
        on_token: called with each step's (B, samples) tokens, for streaming; padding after the end.
        compiled: decode with `torch.compile`, as CUDA graphs on a GPU. The first batch of a shape
            takes its time to compile: for many or long answers.

    Returns:
        len(prompts) * samples 1-D token tensors, the samples of one prompt side by side. The draws
        of a prompt do not depend on when the others end.

    Raises:
        ValueError: if a prompt leaves no room for an answer within the model's context.
    """
    config, device = model.config, model.head.weight.device
    width = max(len(prompt) for prompt in prompts)
    steps = min(max_new_tokens, config.text.max_position_embeddings - width)
    if steps < 1:
        raise ValueError(
            f"a prompt of {width} tokens leaves no room for an answer in a context of "
            f"{config.text.max_position_embeddings}"
        )
    logits, now = prefill(model, images, prompts, samples, steps)
    next_logits = compiled_decode(now.cache) if compiled else decode
    banned = torch.zeros(logits.shape[-1], device=device)
    banned[[config.image_token, config.pad_token]] = -torch.inf  # never chosen
    itself = now.mask.new_full((samples, samples), -torch.inf).fill_diagonal_(0)
    answers = now.row.new_full((len(prompts), samples, steps), config.pad_token)
    for step in range(steps):
        draw = None
        if temperature > 0:
            draw = torch.rand(answers.shape[:2], generator=generator, device=device)[now.row]
        token = choose(logits + banned, temperature, draw)
        answers[now.row, :, step] = token.masked_fill(now.finished, config.pad_token)
        if on_token:
            on_token(answers[:, :, step])
        now.finished |= token == config.eos_token
        if step + 1 == steps:
            break
        if device.type == "cpu" or (step + 1) % CHECK_EVERY == 0:
            alive = ~now.finished.all(dim=1)
            count = int(alive.sum())
            if count == 0:
                break
            if count <= len(alive) // 2 and not compiled:
                now.keep(alive)  # copies the buffers, at most once per halving
                token = token[alive]
        now.mask.index_copy_(3, now.slots, itself.expand(len(token), 1, -1, -1))
        seen = None if compiled else width + (step + 1) * samples
        logits = next_logits(
            model, token, now.position, now.slots, now.mask[..., :seen], now.cache
        )
        now.position += 1
        now.slots += samples
    flat = answers.flatten(0, 1)  # (B * samples, steps)
    with torch.inference_mode(False):  # what is made in here is fit for training again
        return [answer[answer != config.pad_token] for answer in flat]


def prefill(
    model: LLaVA, images: Tensor | None, prompts: list[Tensor], samples: int, steps: int
) -> tuple[Tensor, Decoding]:
    """Read the prompts: logits (B, samples, V) of the first new token, and where it will go."""
    device = model.head.weight.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = nn.utils.rnn.pad_sequence(
        [prompt.to(device) for prompt in prompts], True, model.config.pad_token
    )  # (B, T)
    rows, width = tokens.shape
    slots = -(-(width + steps * samples) // SLOTS) * SLOTS
    cache = model.decoder.new_cache(rows, slots)
    slot = torch.arange(slots, device=device)
    inside = slot < length[:, None]  # (B, slots)
    hidden = model(
        images, tokens, slot[:width].expand(rows, -1), inside[:, :width].long() - 1,
        cache=cache, slots=slot[:width],
    )  # (B, T, D)
    logits = model.head(hidden[torch.arange(rows, device=device), length - 1])  # (B, V)
    mask = torch.zeros(rows, samples, slots, dtype=cache.k[0].dtype, device=device)
    return logits.unsqueeze(1).expand(-1, samples, -1), Decoding(
        row=torch.arange(rows, device=device),
        finished=torch.zeros(rows, samples, dtype=torch.bool, device=device),
        position=length[:, None].repeat(1, samples),
        slots=slot[width : width + samples].clone(),
        mask=mask.masked_fill_(~inside[:, None], -torch.inf).unsqueeze(1),
        cache=cache,
    )


def decode(
    model: LLaVA, token: Tensor, position: Tensor, slots: Tensor, mask: Tensor, cache: KVCache
) -> Tensor:
    """Logits (B, samples, V) that follow one more token of every sample; see `Decoding`."""
    return model.head(model(None, token, position, mask=mask, cache=cache, slots=slots))


@functools.cache
def compiled() -> Callable:
    return torch.compile(decode, mode="reduce-overhead", dynamic=False)


def compiled_decode(cache: KVCache) -> Callable:
    """`decode` compiled for the shapes that it meets; on a GPU replayed as CUDA graphs."""
    for buffer in (*cache.k, *cache.v):  # written in place: a graph must not work on copies of them
        torch._dynamo.mark_static_address(buffer)

    def step(*args) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned has been used
        return compiled()(*args)

    return step


def choose(logits: Tensor, temperature: float, draw: Tensor | None) -> Tensor:
    """One token per row of (n, samples, V) logits: the likeliest, or where `draw` falls.

    Args:
        temperature: 0 takes the most likely token.
        draw: (n, samples) uniform in [0, 1), if the temperature is above 0.
    """
    if temperature == 0:
        return logits.argmax(-1)
    reached = (logits / temperature).softmax(-1).cumsum(-1)
    # 1 - draw is above 0: a token of probability 0 is never where the sum first reaches it.
    wanted = (1 - draw)[..., None] * reached[..., -1:]
    return torch.searchsorted(reached, wanted).squeeze(-1)
