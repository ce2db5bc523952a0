"""The model: a LLaMA decoder that reads projected image features among its tokens (LLaVA-1.5).

    pixels -> ViT -> projector -+
                                +-> decoder -> hidden states -> head -> log-probabilities
    tokens -> embedding --------+

One attention rule serves training, reference scoring and generation. A row is a shared prefix, the
*trunk* (image and prompt), followed by *branches* (responses), and a token attends to what precedes
it in the trunk or in its own branch. k responses to one prompt therefore cost one prompt, in the
loss as in sampling. A plain causal sequence is a row that is all trunk.

Module names follow LLaMA's public code, so that a reader can compare line by line. Sources: LLaMA
(arXiv 2302.13971), rotary positions (2104.09864), grouped-query attention (2305.13245), LLaVA-1.5
(2310.03744).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
import parallel
from kernels.lean import RMSNorm, gated_silu
from lora import LoRALinear, same_adapter
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


class Head(nn.Linear):
    """The vocabulary matrix, which a loss can use without ever holding the logits.

    A module, not a bare weight, because sharded training gathers weights in `forward`.
    """

    def forward(self, hidden: Tensor, function: Callable | None = None, *arguments):
        """Return logits (..., V) of hidden states (..., D), or the result of a function.

        Args:
            function: called as `function(hidden, weight, *arguments)` with the gathered weight
                (V, D), both in the dtype of matrix products: `kernels.token_logp`, or your own.
        """
        if function is None:
            return super().forward(hidden)
        dtype = product_dtype(self.weight)  # autocast does not reach into custom functions
        return function(hidden.to(dtype), self.weight.to(dtype), *arguments)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with this weight: autocast's, or its own."""
    kind = weight.device.type
    low = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if low else weight.dtype


def attention_mask(branch: Tensor) -> Tensor:
    """Return the causal mask over the shared prefix (the trunk) and a token's own branch.

    Args:
        branch: (B, T): 0 trunk, 1.. branches, -1 padding.

    Returns:
        (B, 1, T, T) bool, True = attends. Padding attends to itself, so no row is empty.
    """
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device)
    kv, query = branch[:, None], branch[:, :, None]
    return (causal.tril() & ((kv == 0) | (kv == query))).unsqueeze(1)


def rotary(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
    """Return cos and sin of (B, T) positions, each (B, 1, T, head_dim), for `rotate`."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    angle = (position[..., None].float() / theta**exponent).unsqueeze(1)  # (B, 1, T, head_dim / 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (a, b) of every head to (a cos - b sin, b cos + a sin).

    In place: nothing else reads x. Halves are paired, not neighbours, as in transformers; `sin`
    carries the minus.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(swapped, sin)


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = LoRALinear(width, width)
        self.k_proj = LoRALinear(width, kv_width)
        self.v_proj = LoRALinear(width, kv_width)
        self.o_proj = LoRALinear(width, width)

    def forward(self, x, cos, sin, mask, cache=None):
        """x (B, T, D); mask (B, 1, T, S) bool or added to the scores, None for plain causal.

        cache: (keys, values, slots): x fills the slots (T,); attention covers the first S slots.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, heads, T, hd)
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


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = LoRALinear(config.hidden_size, config.intermediate_size)
        self.up_proj = LoRALinear(config.hidden_size, config.intermediate_size)
        self.down_proj = LoRALinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


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
    """Return x + update, in the update's memory unless its dtype differs (under autocast: half)."""
    return update.add_(x) if update.dtype == x.dtype else x + update


class Decoder(nn.Module):
    """LLaMA without its head: embeddings in, hidden states after the final norm out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # Zeros, for `init_weights` or a file to fill: nn.Embedding would draw 131 million numbers.
        start = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(start, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, x, position, mask=None, cache=None, slots=None):
        if mask is not None and mask.dtype == torch.bool:  # convert once, not in every layer
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
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False,
                               context_fn=same_adapter(block))
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


class LLaVA(nn.Module):
    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.projector = Projector(
            config.vision.hidden_size, config.text.hidden_size, config.projector_hidden_act)
        self.decoder = Decoder(config.text)
        self.head = Head(config.text.hidden_size, config.text.vocab_size, bias=False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) as the tower's patch features (B, patches, D_vision)."""
        return self.vision_tower(pixels, self.config.vision_feature_layer)[:, 1:]

    def embed(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """Return token embeddings (B, T, D), with projected features in place of image tokens.

        Args:
            images: (M, 3, H, W) pixels, or (M, patches, D_vision) features cached from a frozen
                tower, for the M rows that have an image, in order; None if none has.
            tokens: (B, T) long.
        """
        x = self.decoder.embed_tokens(tokens)
        learns = torch.is_grad_enabled() and self.projector.linear_1.weight.requires_grad
        elsewhere = learns and sum(parallel.total([images is not None])) > 0
        if images is None and elsewhere:  # take part in the projector's gradient anyway
            blank = x.new_zeros(1, self.config.vision.hidden_size)
            return x + 0 * self.projector(blank).sum()
        if images is None:
            return x
        features = self.image_features(images) if images.ndim == 4 else images
        features = self.projector(features.to(x.dtype)).flatten(0, 1)  # (M * patches, D)
        here = (tokens == self.config.image_token).flatten()
        count = here.sum()
        if here.is_cuda:  # fails later, but does not wait for the device
            torch._assert_async(count == len(features), "not as many image tokens as features")
        elif not here.is_meta and count != len(features):
            raise ValueError(f"{count} image tokens for {len(features)} image features")
        # x[here] = features, with the size of `here` known beforehand: works on meta tensors, too
        place = here.nonzero_static(size=len(features)).squeeze(1)
        return x.flatten(0, 1).index_copy(0, place, features.to(x.dtype)).view_as(x)

    def forward(
        self, images: Tensor | None, tokens: Tensor, position: Tensor | None = None,
        branch: Tensor | None = None, mask: Tensor | None = None, cache=None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm.

        Args:
            images: see `embed`.
            tokens: (B, T) long.
            position: (B, T) long rotary positions; None counts from 0.
            branch: (B, T) long, 0 trunk, 1.. branches, -1 padding; None is all trunk.
            mask: (B, 1, T, S), bool or added to the attention scores, in place of `branch`.
            cache, slots: a `generation.KVCache`; write the tokens' keys and values to these slots
                (T,) and attend to the first S.
        """
        if branch is not None:
            mask = attention_mask(branch)
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.decoder(self.embed(images, tokens), position, mask, cache, slots)

    def response_states(self, batch) -> Tensor:
        """Return the hidden states (R, D) that predict the response tokens of a `data.Batch`.

        Only these meet the vocabulary matrix.
        """
        hidden = self(batch.images, batch.tokens, batch.position, batch.branch)  # (B, T, D)
        return hidden.flatten(0, 1)[batch.source]

    def response_logp(self, batch, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities (R,) of a batch's response tokens, float32."""
        states = self.response_states(batch) / temperature  # W (h / t) = (W h) / t
        return self.head(states, kernels.token_logp, batch.target)

    def logits(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """Return (B, T, V) logits of plain causal sequences, for parity checks and small models."""
        return self.head(self(images, tokens))


def add_layers(model: LLaVA, layers: int, seed: int = 0) -> None:
    """Put more decoder layers on top, in place.

    Their output matrices are 0, the others are drawn from the seed: they start as the identity.
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
    """Draw weights: normal, with standard deviation 1 / sqrt(fan-in), or 0.02 for embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.ndim > 1:
                embeds = "embed_tokens" in name or "position" in name
                std = 0.02 if embeds else weight[0].numel() ** -0.5
                weight.normal_(0, std, generator=generator)
            else:
                weight.fill_("norm" in name and name.endswith("weight"))
