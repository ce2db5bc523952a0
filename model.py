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
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from generation import generate  # noqa: F401  (part of this file's interface)
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
        y = F.linear(x, self.weight)
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

    def forward(self, hidden: Tensor, target: Tensor | None = None, **pairs):
        """What is asked of the hidden states that predict a token each.

        Args:
            hidden: (..., D); (R, D) with a target.
            target: (R,) the tokens; None asks for the logits.
            pairs: the further arguments of `kernels.ddpo_loss`, to ask for that.

        Returns:
            (..., V) logits, (R,) float32 log-probabilities, or what `kernels.ddpo_loss` returns.
        """
        if target is None:
            return super().forward(hidden)
        dtype = product_dtype(self.weight)  # the kernels want one, and autocast does not reach them
        kernel = kernels.ddpo_loss if pairs else kernels.token_logp
        return kernel(hidden.to(dtype), self.weight.to(dtype), target, **pairs)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with this weight are computed in: autocast's dtype, or its own."""
    kind = weight.device.type
    low = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if low else weight.dtype


class KVCache:
    """Keys and values of all layers in static buffers, and the rotary tables of their positions.

    Which slots are looked at is the mask's business. Zeros and not unwritten memory, because a NaN
    in a slot that nobody may look at would still reach the result (0 * NaN).
    """

    def __init__(self, config: TextConfig, rows: int, slots: int, device, dtype: torch.dtype):
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        new = functools.partial(torch.zeros, shape, device=device, dtype=dtype)
        self.k = [new() for _ in range(config.num_hidden_layers)]
        self.v = [new() for _ in range(config.num_hidden_layers)]
        position = torch.arange(slots, device=device)[None]
        tables = rotary(position, config.head_dim, config.rope_theta, dtype)
        self.cos, self.sin = (table[0, 0] for table in tables)  # (slots, head_dim)

    def rotary(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """As the function of that name, looked up."""
        return self.cos[position].unsqueeze(1), self.sin[position].unsqueeze(1)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these: (rows,) indices or bool."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]


def attention_mask(branch: Tensor) -> Tensor:
    """Who may look at whom: causal, and the trunk or the own branch.

    Args:
        branch: (B, T): 0 trunk, 1.. branches, -1 padding.

    Returns:
        (B, 1, T, T) bool, True = may look. Padding sees itself, so no row is empty.
    """
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device)
    kv, query = branch[:, None], branch[:, :, None]
    return (causal.tril() & ((kv == 0) | (kv == query))).unsqueeze(1)


def rotary(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """cos and sin for (B, T) positions, each (B, 1, T, head_dim), as `rotate` takes them."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    angle = (position[..., None].float() / theta**exponent).unsqueeze(1)  # (B, 1, T, head_dim / 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (first, second) halves of every head into (first cos - second sin, second cos + first sin).

    In place: nobody else reads x. The halves and not neighbours are paired, as in LLaMA-HF; `sin`
    carries the minus.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(swapped, sin)


def inverse_size(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


class Normalise(torch.autograd.Function):
    """x * weight / sqrt(mean(x^2) + eps), which keeps x and one number a token for backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_size(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        along = gradient * unit
        by_weight = along.flatten(0, -2).sum(0)
        along = (along @ weight).div_(-x.shape[-1]).unsqueeze(-1)  # (..., 1)
        return unit.mul_(along).addcmul_(gradient, weight).mul_(scale), by_weight, None


class RMSNorm(nn.RMSNorm):
    """torch's, which has a kernel for it on GPUs, but on a CPU keeps a second copy of x.

    Where there is no backward, as in decoding, autograd's part of the work is left out.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.eps
        if not (x.is_cpu and x.dtype == weight.dtype == torch.float32):
            return super().forward(x)
        if torch.is_grad_enabled():
            return Normalise.apply(x, weight, eps)
        return (x * inverse_size(x, eps)).mul_(weight)


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
        """x (B, T, D); mask (B, 1, T, S) bool or added to the scores, None for plain causal.

        cache: (keys, values, slots): x's own go to slots (T,), and the first S slots are looked at.
        """
        q, k, v = (
            proj(x).view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)  # (B, heads, T, hd)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            keys, values, slots = cache
            keys.index_copy_(2, slots, k.to(keys.dtype))
            values.index_copy_(2, slots, v.to(keys.dtype))
            k, v = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]  # (B, kv, S, hd)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.config.num_key_value_heads != self.config.num_attention_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, which computes silu(gate) again in backward and does not keep it."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, F.silu(gate).mul_(gradient)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():  # otherwise autograd's part of the work is left out
            return self.down_proj(GatedSiLU.apply(gate, up))
        return self.down_proj(F.silu(gate).mul_(up))


class Block(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache=None):
        x = add(x, self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return add(x, self.mlp(self.post_attention_layernorm(x)))


def add(x: Tensor, update: Tensor) -> Tensor:
    """x + update, in the update's memory where that can hold it (under autocast it is half)."""
    return update.add_(x) if update.dtype == x.dtype else x + update


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
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def new_cache(self, rows: int, slots: int) -> KVCache:
        weight = self.embed_tokens.weight
        return KVCache(self.config, rows, slots, weight.device, product_dtype(weight))

    def forward(self, x, position, mask=None, cache: KVCache | None = None, slots=None):
        if mask is not None and mask.dtype == torch.bool:  # what every layer would make of it, once
            zeros = torch.zeros_like(mask, dtype=product_dtype(self.embed_tokens.weight))
            mask = zeros.masked_fill_(~mask, -torch.inf)
        if cache is None:
            cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        else:
            cos, sin = cache.rotary(position)
        for i, block in enumerate(self.layers):
            if cache is not None:
                x = block(x, cos, sin, mask, (cache.k[i], cache.v[i], slots))
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
        here = (tokens == self.config.image_token).flatten()
        if not here.is_meta and here.sum() != len(features):
            raise ValueError(f"{here.sum()} image tokens for {len(features)} image features")
        # x[here] = features, but for the size of `here` known beforehand: works without values too
        place = here.nonzero_static(size=len(features)).squeeze(1)
        return x.flatten(0, 1).index_copy(0, place, features.to(x.dtype)).view_as(x)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        position: Tensor | None = None,
        branch: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        Args:
            images: see `embed`.
            tokens: (B, T) long.
            position: (B, T) long rotary positions; None counts from 0.
            branch: (B, T) long, 0 trunk, 1.. branches, -1 padding; None is all trunk.
            mask: (B, 1, T, S), bool or added to the attention scores, in place of `branch`.
            cache, slots: keep the tokens' keys and values in these slots (T,) of the buffers and
                look at the first S slots.
        """
        if branch is not None:
            mask = attention_mask(branch)
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.decoder(self.embed(images, tokens), position, mask, cache, slots)

    def logits(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, T, V) logits of plain causal sequences; for parity checks and small models."""
        return self.head(self(images, tokens))


def deepen(model: LLaVA, layers: int, seed: int = 0) -> None:
    """Put so many more decoder layers on top, in place.

    Their output matrices are 0 (the others drawn from the seed): at first they pass on what they
    are given.
    """
    text = model.config.text
    new = nn.ModuleList(Block(text) for _ in range(layers))
    init_weights(new, seed)
    for block in new:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    model.decoder.layers.extend(new.to(model.head.weight))
    model.decoder.config = replace(text, num_hidden_layers=len(model.decoder.layers))
    model.config = replace(model.config, text=model.decoder.config)


def init_weights(model: nn.Module, seed: int) -> None:
    """Random weights for a model that is not loaded: normal with deviation 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.ndim > 1:
                std = 0.02 if "embed_tokens" in name or "position" in name else 0
                weight.normal_(0, std or weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_("norm" in name and name.endswith("weight"))
