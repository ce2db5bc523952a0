"""Decoding: a prompt is computed once, and its samples are decoded as branches of it.

What several prompts about one image begin with is computed once, too. The keys and values of a
batch lie in buffers of fixed size, one slot per token:

    slot      0 .. width - 1      width, +1, ..       ..                       .. slots - 1
              prompt (trunk)      step 0: sample 1..k | step 1: sample 1..k |  ..  | unused

A mask (rows, 1, samples, slots), added to the attention scores, opens the prompt's slots to every
sample from the start, and to each sample its own new slots as they are filled. A step only writes
into preallocated buffers. Eager decoding attends to the filled slots only; compiled decoding to all
of them, so that no shape changes and CUDA graphs can replay the step.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import prompt_text, prompt_tokens, split
from formats.tokenizer import IMAGE
from model import LLaVA, attention_mask, product_dtype, rotary
from parallel import Draws
from vision import ImageSettings, preprocess

SLOTS = 64  # buffers are multiples of this: prompts of similar length share a compiled step
MANY_STEPS = 4096  # fewer do not repay compilation: at 7B 25 s, for 6 to 7 ms a step (H200)
CHECK_EVERY = 16  # steps on a GPU between checks whether all rows have ended: each check waits


class KVCache:
    """Keys and values of all layers in static buffers, and the rotary tables of their positions.

    The buffers start as zeros: a NaN in a masked slot would still reach the result (0 * NaN).
    """

    def __init__(self, model: LLaVA, rows: int, slots: int, positions: int):
        config, weight = model.config.text, model.decoder.embed_tokens.weight
        device, dtype = weight.device, product_dtype(weight)
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        new = functools.partial(torch.zeros, shape, device=device, dtype=dtype)
        self.k = [new() for _ in range(config.num_hidden_layers)]
        self.v = [new() for _ in range(config.num_hidden_layers)]
        position = torch.arange(positions, device=device)[None]
        tables = rotary(position, config.head_dim, config.rope_theta, dtype)
        self.cos, self.sin = (table[0, 0] for table in tables)  # (positions, head_dim)

    def rotary(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of positions, as `model.rotary` computes them."""
        return self.cos[position].unsqueeze(1), self.sin[position].unsqueeze(1)

    def keep(self, rows: Tensor, more: int = 0) -> None:
        """Keep these rows alone, (rows,) indices or bool, and add empty slots."""
        for buffers in (self.k, self.v):
            for i, old in enumerate(buffers):  # one at a time, to hold few of them twice
                kept = old[rows]
                buffers[i] = nn.functional.pad(kept, (0, 0, 0, more)) if more else kept


@dataclass
class Decoding:
    """The rows still being decoded, and where their next tokens go."""

    row: Tensor  # (n,) which prompt
    finished: Tensor  # (n, samples) bool
    position: Tensor  # (n, samples) of the newest token
    slots: Tensor  # (samples,) where its keys and values go
    mask: Tensor  # (n, 1, samples, slots), 0 or -inf
    cache: KVCache

    def keep(self, alive: Tensor) -> None:
        """Drop finished rows; alive: (n,) bool."""
        for name in ("row", "finished", "position", "mask"):
            setattr(self, name, getattr(self, name)[alive])
        self.cache.keep(alive)


@torch.inference_mode()
def generate(
    model: LLaVA, images: Tensor | None, prompts: list[Tensor], max_new_tokens: int = 256,
    temperature: float = 0.0, samples: int = 1, generator: torch.Generator | Draws | None = None,
    on_token: Callable[[Tensor], None] | None = None, compiled: bool = False,
    on_logp: Callable[[Tensor], None] | None = None, image_of: Sequence[int] | None = None,
) -> list[Tensor]:
    """Decode a batch of prompts: each prompt is computed once, its samples are branches of it.

    Args:
        images: as for `LLaVA.embed`, of the prompts that have an image, in order.
        prompts: 1-D token tensors, image tokens expanded.
        max_new_tokens: per completion; one that ends earlier ends with end-of-sequence.
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / t).
        samples: completions per prompt.
        generator: makes the draws; `Draws` if these prompts are a part of a batch.
        on_token: called with each step's (B, samples) tokens, for streaming; padding after the end.
        compiled: decode with `torch.compile`, as CUDA graphs on a GPU (see `worth_compiling`).
        on_logp: called once with (R,) float32 log-probabilities of the new tokens, one completion
            after another, at the temperature (1 if that is 0).
        image_of: the place in `images` of each prompt's image. What all prompts begin with, at
            least up to the image's end, is computed once per image. None: an image per prompt.

    Returns:
        len(prompts) * samples 1-D token tensors, the samples of one prompt side by side. The draws
        of a prompt do not depend on when the others end.

    Raises:
        ValueError: a prompt leaves no room in the model's context, prompts with `image_of` differ
            before an image's end, or the logits are not finite.
    """
    context, width = model.config.text.max_position_embeddings, max(map(len, prompts))
    steps = min(max_new_tokens, context - min(map(len, prompts)))
    if min(max_new_tokens, context - width) < 1:
        raise ValueError(f"a prompt of {width} tokens leaves no room for an answer in a context of "
                         f"{context}")
    logits, start = prefill(model, images, prompts, samples, steps, image_of)
    completions, logp = decode_steps(
        model, logits, start, width, steps, temperature, generator, on_token, compiled,
        on_logp is not None)
    inside = completions != model.config.pad_token
    with torch.inference_mode(False):  # autograd accepts the tensors made here
        if on_logp:
            on_logp(logp[inside])
        return [row[kept] for row, kept in zip(completions.flatten(0, 1), inside.flatten(0, 1))]


def decode_steps(
    model: LLaVA, logits: Tensor, now: Decoding, width: int, steps: int, temperature: float,
    generator: torch.Generator | Draws | None, on_token: Callable | None, compiled: bool,
    keep_logp: bool,
) -> tuple[Tensor, Tensor]:
    """Return all samples' tokens, padded after their end, and log-probabilities (0 if not kept).

    Both are (B, samples, steps).
    """
    config, device = model.config, logits.device
    rows, samples = now.finished.shape
    next_logits = compiled_decode(now.cache) if compiled else decode
    banned = torch.zeros(logits.shape[-1], device=device)
    banned[[config.image_token, config.pad_token]] = -torch.inf  # never sampled
    own_slot_mask = now.mask.new_full((samples, samples), -torch.inf).fill_diagonal_(0)
    completions = now.row.new_full((rows, samples, steps), config.pad_token)
    logp = torch.zeros(completions.shape, device=device)
    last, finite = config.text.max_position_embeddings - 1, logits.isfinite().all()
    for step in range(steps):
        draw = None
        if isinstance(generator, Draws):
            draw = generator(samples)[now.row]
        elif temperature > 0:
            draw = torch.rand((rows, samples), generator=generator, device=device)[now.row]
        token = sample_token(logits + banned, temperature, draw)
        completions[now.row, :, step] = token.masked_fill(now.finished, config.pad_token)
        if keep_logp:  # over all tokens, as in training: banned ones keep their probability
            every = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            logp[now.row, :, step] = every.gather(-1, token[..., None]).squeeze(-1)
        if on_token:
            on_token(completions[:, :, step])
        now.finished |= (token == config.eos_token) | (now.position >= last)
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
        now.mask.index_copy_(3, now.slots, own_slot_mask.expand(len(token), 1, -1, -1))
        filled = None if compiled else width + (step + 1) * samples
        logits = next_logits(
            model, token, now.position, now.slots, now.mask[..., :filled], now.cache)
        finite &= logits.isfinite().all()
        now.position += 1
        now.slots += samples
    if not finite:
        raise ValueError("the model computes NaN or infinity; check its weights, or use --dtype "
                         "float32 (float16 overflows easily)")
    return completions, logp


def prefill(
    model: LLaVA, images: Tensor | None, prompts: list[Tensor], samples: int, steps: int,
    image_of: Sequence[int] | None = None,
) -> tuple[Tensor, Decoding]:
    """Compute the prompts; return the first new token's logits (B, samples, V) and the state."""
    device = model.head.weight.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = nn.utils.rnn.pad_sequence(
        [prompt.to(device) for prompt in prompts], True, model.config.pad_token)  # (B, T)
    rows, width = tokens.shape
    slots = -(-(width + steps * samples) // SLOTS) * SLOTS
    slot = torch.arange(slots, device=device)
    inside = slot < length[:, None]  # (B, slots)
    causal = attention_mask(inside[:, :width].long() - 1)  # (B, 1, T, T)
    shared = 0  # tokens that all prompts begin with, computed once per image
    if image_of is not None:
        alike = (tokens == tokens[0]).all(dim=0)[: min(map(len, prompts)) - 1]
        shared, first = int(alike.long().cumprod(0).sum()), len(images)
        if (tokens[:, shared:] == model.config.image_token).any():
            raise ValueError("prompts that share images differ before an image's end")
        cache = KVCache(model, first, shared, slots)
        model(images, tokens[:first, :shared], slot[:shared].expand(first, -1),
              mask=causal[:first, :, :shared, :shared], cache=cache, slots=slot[:shared])
        images = None
        cache.keep(torch.tensor(image_of, device=device), slots - shared)
    else:
        cache = KVCache(model, rows, slots, slots)
    hidden = model(
        images, tokens[:, shared:], slot[shared:width].expand(rows, -1),
        mask=causal[:, :, shared:], cache=cache, slots=slot[shared:width])  # (B, T - shared, D)
    logits = model.head(hidden[torch.arange(rows, device=device), length - 1 - shared])  # (B, V)
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
    """Return the logits (B, samples, V) after one more token of every sample; see `Decoding`."""
    return model.head(model(None, token, position, mask=mask, cache=cache, slots=slots))


def worth_compiling(device: torch.device, steps: float = math.inf) -> bool:
    """Return whether this many decoding steps repay compiling one: on a GPU, thousands do."""
    return device.type == "cuda" and steps >= MANY_STEPS


@functools.cache
def compiled() -> Callable:
    return torch.compile(decode, mode="reduce-overhead", dynamic=False)


def compiled_decode(cache: KVCache) -> Callable:
    """Compile `decode`; on a GPU, CUDA graphs replay it."""
    for buffer in (*cache.k, *cache.v):  # written in place: a graph must not copy them
        torch._dynamo.mark_static_address(buffer)

    def step(*args) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last step's result has been used
        return compiled()(*args)

    return step


def sample_token(logits: Tensor, temperature: float, draw: Tensor | None) -> Tensor:
    """Choose a token for each sample of (n, samples, V) logits.

    Args:
        temperature: 0 takes the most likely token.
        draw: (n, samples) uniform in [0, 1), which picks the token if the temperature is above 0.
    """
    if temperature == 0:
        return logits.argmax(-1)
    reached = (logits / temperature).softmax(-1).cumsum(-1)
    # 1 - draw is above 0: the sum never first reaches it at a token of probability 0.
    wanted = (1 - draw)[..., None] * reached[..., -1:]
    return torch.searchsorted(reached, wanted).squeeze(-1).clamp_(max=logits.shape[-1] - 1)  # NaN


# -------------------------------------------------------------------------- answers to many prompts


def pixels_of(images: Sequence[Image.Image], settings: ImageSettings) -> Tensor:
    """Return the tower's input, (N, 3, size, size)."""
    return torch.stack([preprocess(image, settings.size, settings.mean, settings.std, settings.mode)
                        for image in images])


@torch.no_grad()
def image_features(
    model: LLaVA, settings: ImageSettings, images: Sequence[Image.Image], batch_size: int = 64
) -> Tensor:
    """Compute the tower's features (N, patches, D_vision), once for several questions."""
    like = model.head.weight
    return torch.cat([model.image_features(pixels_of(part, settings).to(like))
                      for part in split(images, batch_size)])


def progress_bar(total: int, label: str | None):
    """Show a bar on a terminal, none elsewhere, and none without a label."""
    return tqdm(total=total, desc=label, disable=True if label is None else None, leave=False)


def answers(
    model: LLaVA, tokenizer, settings: ImageSettings, images: Sequence[Image.Image | Tensor],
    questions: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0,
    samples: int = 1, seed: int = 0, batch_size: int = 64, progress: str | None = None,
    compiled: bool | None = None,
) -> list[str]:
    """Answer questions about images, one image and one question each.

    Args:
        images: one per question: Pillow images, or the tower's features (patches, D_vision). The
            same object several times is computed once, so questions about one image cost less.
        questions: without `<image>` and template; both are added.
        max_new_tokens: per answer.
        temperature: 0 is greedy; above 0 draws from a generator seeded by (seed, batch index).
        samples: answers per question.
        batch_size: questions per batch; those about one image go together, or else prompts of
            similar length.
        progress: label of a progress bar; None shows none.
        compiled: see `generate`; None leaves it to `worth_compiling`.

    Returns:
        len(questions) * samples texts in the order of the questions, samples of one side by side.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions")
    patches, like = model.config.vision.patches, model.head.weight
    prompts = [torch.tensor(prompt_tokens(tokenizer, prompt_text(question), patches))
               for question in questions]
    if compiled is None:
        compiled = worth_compiling(like.device, len(prompts) / batch_size * max_new_tokens)
    images = list(images)  # of a tensor, every access would make another object
    first = {}
    which = [first.setdefault(id(image), i) for i, image in enumerate(images)]
    shared = len(first) < len(images)
    order = sorted(range(len(prompts)), key=lambda i: (shared and which[i], len(prompts[i])))
    texts = [""] * (len(prompts) * samples)
    with progress_bar(len(prompts), progress) as bar:
        for index, rows in enumerate(split(order, batch_size)):
            distinct = list(dict.fromkeys(which[i] for i in rows))
            image_of = [distinct.index(which[i]) for i in rows] if shared else None
            found = [images[i] for i in distinct]
            batch = torch.stack(found) if torch.is_tensor(found[0]) else pixels_of(found, settings)
            generator = torch.Generator(like.device).manual_seed(seed * 1_000_003 + index)
            out = generate(
                model, batch.to(like), [prompts[i] for i in rows], max_new_tokens, temperature,
                samples, generator, compiled=compiled, image_of=image_of)
            for k, tokens in enumerate(out):
                row = rows[k // samples] * samples + k % samples
                texts[row] = tokenizer.decode(tokens).strip()
            bar.update(len(rows))
    return texts


def stream(
    model: LLaVA, tokenizer, settings: ImageSettings, image: Image.Image, question: str,
    max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0,
    write: Callable[[str], object] = functools.partial(print, end="", flush=True),
) -> str:
    """Write one answer piece by piece as it is decoded, and return it whole."""
    like, tokens, text = model.head.weight, [], ""

    def on_token(step: Tensor) -> None:
        nonlocal text
        tokens.append(int(step[0, 0]))
        whole = tokenizer.decode(tokens)
        if not whole.endswith("\ufffd"):  # the rest of this character is still to come
            write(whole[len(text) :])
            text = whole

    prompt = torch.tensor(prompt_tokens(
        tokenizer, prompt_text(question.replace(IMAGE, "").strip()), model.config.vision.patches))
    out = generate(model, pixels_of([image], settings).to(like), [prompt], max_new_tokens,
                   temperature, 1, torch.Generator(like.device).manual_seed(seed), on_token)
    whole = tokenizer.decode(out[0])
    write(whole[len(text) :] + "\n")
    return whole.strip()
