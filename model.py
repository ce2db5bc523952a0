"""The model: a LLaMA decoder that reads projected image features among its tokens (LLaVA-1.5).

    pixels -> ViT -> projector -+
                                +-> decoder -> hidden states -> head -> log-probabilities
    tokens -> embedding --------+

One attention rule serves training, reference scoring and generation. A row is a *trunk* (image and
prompt) followed by *branches* (responses), and a token may look at whatever came before it in the
trunk or in its own branch. k responses to one prompt therefore cost one prompt, in the loss as in
sampling; a plain causal sequence is a row that is all trunk.

Module names follow LLaMA's public code where it has one, so that a reader can compare line by line;
`checkpoint.py` knows how the public files spell them. Sources: LLaMA (arXiv 2302.13971), rotary
positions (2104.09864), grouped-query attention (2305.13245), LLaVA-1.5 (2310.03744), LoRA (2106.09685).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from vision import ViT, VisionConfig


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder; names are those of the public config.json, defaults LLaMA-7B's."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32  # fewer than attention heads: grouped-query attention
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LLaVAConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token: int = 32000
    pad_token: int = 32001
    eos_token: int = 2
    vision_feature_layer: int = -2
    projector_hidden_act: str = "gelu"  # "linear" (none) for LLaVA v1's one-layer projector


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
        return self.B @ self.A * (self.alpha / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        # A and B are kept and trained in float32 but multiplied in the activations' dtype: float32
        # products beside a bfloat16 base would cost more than the base's own.
        low = F.linear(x, self.A.to(x.dtype)) * (self.alpha / self.rank)  # (..., rank)
        return F.linear(low, self.B.to(x.dtype))


class Linear(nn.Linear):
    """nn.Linear that can carry several named adapters, of which one or none is active."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.active is not None:
            y = y + self.adapters[self.active](x)
        return y

    def merged(self, name: str) -> Tensor:
        """The weight with one adapter's update added, summed in float32: (out, in)."""
        return (self.weight.float() + self.adapters[name].delta()).to(self.weight.dtype)


class Head(nn.Linear):
    """The vocabulary matrix. Given targets it returns their log-probabilities, never the logits.

    A module and not a bare weight, because sharded training (FSDP) gathers weights in `forward`.
    """

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            return super().forward(hidden)  # (..., V)
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        return kernels.token_logp(hidden.to(dtype), self.weight.to(dtype), target)  # (R,)


class KVCache:
    """Static buffers for keys and values, and the branch of every slot filled so far."""

    def __init__(self, config: TextConfig, rows: int, slots: int, like: Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.k = like.new_empty(shape)
        self.v = like.new_empty(shape)
        self.branch = torch.full((rows, slots), -1, device=like.device)
        self.filled = 0


def attention_mask(branch: Tensor, cached: Tensor | None = None) -> Tensor:
    """Who may look at whom: causal, and the trunk or the own branch.

    Args:
        branch: (B, T) of the queries: 0 trunk, 1.. branches, -1 padding.
        cached: (B, S) of the slots that come before them, or None.

    Returns:
        (B, 1, T, S + T) bool, True = may look. Padding sees itself, so no row is empty.
    """
    kv = branch if cached is None else torch.cat([cached, branch], dim=1)  # (B, S + T)
    query = branch[:, :, None]
    causal = torch.ones(branch.shape[1], kv.shape[1], dtype=torch.bool, device=branch.device)
    causal = causal.tril(kv.shape[1] - branch.shape[1])
    return (causal & ((kv[:, None] == 0) | (kv[:, None] == query))).unsqueeze(1)


def rotary(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """cos and sin for (B, T) positions, each (B, 1, T, head_dim); halves repeated as in LLaMA-HF."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    angle = position[..., None].float() / theta**exponent  # (B, T, head_dim / 2)
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, kv_width)
        self.v_proj = Linear(width, kv_width)
        self.o_proj = Linear(width, width)

    def forward(self, x, cos, sin, mask, cache=None):
        """x (B, T, D); mask (B, 1, T, S + T) or None for plain causal; cache: (k, v, filled)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, heads, T, hd)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            keys, values, start = cache
            stop = start + x.shape[1]
            keys[:, :, start:stop], values[:, :, start:stop] = k, v
            k, v = keys[:, :, :stop], values[:, :, :stop]  # (B, kv_heads, S + T, hd)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.config.num_key_value_heads != self.config.num_attention_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """LLaMA without its head: embeddings in, hidden states after the final norm out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # Zeros, for `init_weights` or a file to fill: drawing them here would draw 131 million
        # numbers for nothing, and on the meta device cost a second's import of torch's compiler.
        start = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(start, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, x, position, mask=None, cache: KVCache | None = None):
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.layers):
            if cache is not None:
                x = block(x, cos, sin, mask, (cache.k[i], cache.v[i], cache.filled))
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, cos, sin, mask, use_reentrant=False, context_fn=same_adapter(block)
                )
            else:
                x = block(x, cos, sin, mask)
        return self.norm(x)


class Projector(nn.Module):
    """LLaVA-1.5's two-layer bridge from the tower's width to the decoder's."""

    def __init__(self, vision_width: int, text_width: int, hidden_act: str = "gelu"):
        super().__init__()
        self.act = {"gelu": nn.GELU, "linear": nn.Identity}[hidden_act]()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


# Linear layers that carry adapters unless told otherwise: all of a decoder block.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapter(
    model: nn.Module, name: str, rank: int, alpha: float,
    targets: Iterable[str] = TARGETS, seed: int = 0,
) -> None:
    """Give the decoder's linear layers a named adapter; it changes nothing until trained and used.

    Args:
        rank, alpha: the update is B A * alpha / rank, with A of `rank` rows.
        targets: last parts of module names, or whole names.
        seed: A is drawn from a generator of its own; B starts at zero.

    Raises:
        ValueError: no such layer, or the name is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        module for path, module in model.named_modules()
        if isinstance(module, Linear) and any(f".{path}".endswith(f".{t}") for t in targets)
    ]
    if not chosen:
        raise ValueError(f"no linear layer of the decoder is called {' or '.join(targets)}")
    for module in chosen:
        if name in module.adapters:
            raise ValueError(f"the model has an adapter named {name!r} already")
        module.adapters[name] = LoRA(module, rank, alpha, generator)


def carriers(model: nn.Module, name: str) -> list[Linear]:
    """The linear layers that carry an adapter; ValueError if none does."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    found = [module for module in linears if name in module.adapters]
    if not found:
        known = sorted({known for module in linears for known in module.adapters})
        raise ValueError(f"no adapter named {name!r}; there are: {', '.join(known) or 'none'}")
    return found


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with one adapter, or with none; what was in use before is in use again afterwards."""
    chosen = set(carriers(model, name)) if name is not None else set()
    before = [(m, m.active) for m in model.modules() if isinstance(m, Linear)]
    for module, _ in before:
        module.active = name if module in chosen else None
    try:
        yield
    finally:
        for module, active in before:
            module.active = active


def same_adapter(block: nn.Module):
    """For `checkpoint`: recompute in backward with the adapter that forward saw.

    The backward pass usually runs after the `use_adapter` block has ended; without this it would
    recompute with whatever is in use by then, and the gradients would silently be wrong.
    """
    name = next((m.active for m in block.modules() if isinstance(m, Linear) and m.active), None)
    return lambda: (contextlib.nullcontext(), use_adapter(block, name))


def merge_adapter(model: nn.Module, name: str) -> None:
    """Add an adapter's update to the weights it sits on, in place, and drop the adapter."""
    for module in carriers(model, name):
        with torch.no_grad():
            module.weight.copy_(module.merged(name))
        del module.adapters[name]
        module.active = None if module.active == name else module.active


def select_trainable(
    model: "LLaVA", adapter: str | None = None, tower: bool = False
) -> list[nn.Parameter]:
    """Freeze everything but what is to be trained, and return that.

    Args:
        adapter: train this adapter alone; None trains the base: decoder, head and projector.
        tower: with the base, train the vision tower too.
    """
    for path, weight in model.named_parameters():
        if adapter is not None:
            weight.requires_grad_(f".adapters.{adapter}." in path)
        else:
            base = ".adapters." not in path
            weight.requires_grad_(base and (tower or not path.startswith("vision_tower.")))
    return [weight for weight in model.parameters() if weight.requires_grad]


class LLaVA(nn.Module):
    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.projector = Projector(
            config.vision.hidden_size, config.text.hidden_size, config.projector_hidden_act
        )
        self.decoder = Decoder(config.text)
        self.head = Head(config.text.hidden_size, config.text.vocab_size, bias=False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """What the projector reads: (B, 3, H, W) -> (B, patches, D_vision), class token dropped."""
        return self.vision_tower(pixels, self.config.vision_feature_layer)[:, 1:]

    def embed(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with the image tokens' places taken by projected features.

        Args:
            images: (M, 3, H, W) pixels, or (M, patches, D_vision) features cached from a frozen
                tower, for the M rows that have an image, in order; None if none has.
            tokens: (B, T) long.
        """
        x = self.decoder.embed_tokens(tokens)
        if images is None:
            return x
        features = self.image_features(images) if images.ndim == 4 else images
        features = self.projector(features.to(x.dtype)).flatten(0, 1)  # (M * patches, D)
        here = tokens == self.config.image_token
        if here.sum() != len(features):
            raise ValueError(f"{here.sum()} image tokens for {len(features)} image features")
        x[here] = features.to(x.dtype)
        return x

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        position: Tensor | None = None,
        branch: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        Args:
            images: see `embed`.
            tokens: (B, T) long.
            position: (B, T) long rotary positions; None counts from 0.
            branch: (B, T) long, 0 trunk, 1.. branches, -1 padding; None is all trunk.
            cache: buffers that this call's keys and values are appended to; needs `branch`.
        """
        mask = None
        if branch is not None:
            mask = attention_mask(branch, cache and cache.branch[:, : cache.filled])
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.decoder(self.embed(images, tokens), position, mask, cache)
        if cache is not None:
            stop = cache.filled + tokens.shape[1]
            cache.branch[:, cache.filled : stop] = branch
            cache.filled = stop
        return hidden

    def logits(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, T, V) logits of plain causal sequences; for parity checks and small models."""
        return self.head(self(images, tokens))


def init_weights(model: LLaVA, seed: int) -> None:
    """Random weights for a model that is not loaded: normal with deviation 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.ndim > 1:
                std = 0.02 if "embed_tokens" in name or "position" in name else 0
                weight.normal_(0, std or weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_("norm" in name and name.endswith("weight"))


@torch.no_grad()
def generate(
    model: LLaVA,
    images: Tensor | None,
    prompts: list[Tensor],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Answers to a batch of prompts: each prompt is read once, its samples are branches of it.

    Args:
        images: as for `LLaVA.embed`, for those prompts that have an image, in order.
        prompts: 1-D token tensors, image tokens expanded.
        max_new_tokens: answers are cut off here; a whole answer ends with end-of-sequence.
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / t).
        samples: answers per prompt.
        on_token: called with each step's (B, samples) tokens, for streaming.

    Returns:
        len(prompts) * samples 1-D token tensors, the samples of one prompt side by side.

    Raises:
        ValueError: if a prompt leaves no room for an answer within the model's context.
    """
    config, device = model.config, model.head.weight.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = nn.utils.rnn.pad_sequence(
        [prompt.to(device) for prompt in prompts], True, config.pad_token
    )  # (B, T)
    rows, width = tokens.shape
    max_new_tokens = min(max_new_tokens, config.text.max_position_embeddings - width)
    if max_new_tokens < 1:
        raise ValueError(
            f"a prompt of {width} tokens leaves no room for an answer in a context of "
            f"{config.text.max_position_embeddings}"
        )
    slot = torch.arange(width, device=device).expand(rows, -1)
    trunk = torch.where(slot < length[:, None], 0, -1)
    cache = KVCache(config.text, rows, width + samples * max_new_tokens, model.head.weight)
    hidden = model(images, tokens, slot, trunk, cache)
    last = hidden[torch.arange(rows, device=device), length - 1]  # (B, D)
    logits = model.head(last).unsqueeze(1).expand(-1, samples, -1)  # (B, samples, V)

    branch = torch.arange(1, samples + 1, device=device).expand(rows, -1)
    finished = torch.zeros(rows, samples, dtype=torch.bool, device=device)
    answers = []
    for step in range(max_new_tokens):
        token = next_token(logits, config, temperature, generator)
        answers.append(token.masked_fill(finished, config.pad_token))
        if on_token:
            on_token(answers[-1])
        finished = finished | (token == config.eos_token)
        # Asking whether all are done waits for the device: on a GPU not at every token.
        if step + 1 == max_new_tokens or (device.type == "cpu" or step % 16 == 15) and finished.all():
            break
        position = (length[:, None] + step).expand(-1, samples)
        logits = model.head(model(None, answers[-1], position, branch, cache))
    flat = torch.stack(answers, dim=-1).flatten(0, 1)  # (B * samples, steps)
    return [answer[answer != config.pad_token] for answer in flat]


def next_token(logits: Tensor, config: LLaVAConfig, temperature: float, generator) -> Tensor:
    """One token per row of (B, samples, V) logits; the image and padding tokens are never chosen."""
    logits = logits.float().clone()
    logits[..., [config.image_token, config.pad_token]] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
