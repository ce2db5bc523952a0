"""The vision tower: a transformer in CLIP's layout, and how an image becomes its input.

LLaVA-1.5 uses CLIP ViT-L/14 at 336 pixels (Radford et al. 2021, arXiv 2103.00020) and takes the
patch features of the second-to-last layer. The small tower of the built-in world differs only in
the numbers of its `VisionConfig`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the tower; field names are those of the public config.json, defaults LLaVA-1.5's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336  # pixels; images are square
    patch_size: int = 14  # pixels
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ImageSettings:
    """How images become pixels: the arguments of `preprocess`, as read from a model's folder."""

    size: int = 336
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    mode: str = "pad"


def quick_gelu(x: Tensor) -> Tensor:
    """Return CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ViTBlock(nn.Module):
    """Pre-norm transformer block with biases, as in CLIP; every patch attends to every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.act = ACTIVATIONS[config.hidden_act]
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        h = self.norm1(x)
        q, k, v = (
            proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.out_proj(h)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """CLIP's vision transformer. `forward` returns the hidden states that LLaVA projects."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(
            3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        start = torch.zeros(config.patches + 1, width)  # zeros: see model.Decoder
        self.position_embedding = nn.Embedding.from_pretrained(start, freeze=False)
        self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(ViTBlock(config) for _ in range(config.num_hidden_layers))
        # CLIP pools through this norm; LLaVA never does, but the public weights contain it.
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor, layer: int = -2) -> Tensor:
        """Return the hidden states of one layer, class token first.

        Args:
            pixels: (B, 3, image_size, image_size), normalised.
            layer: index into [embeddings, layer 1, ..., layer L], as `vision_feature_layer` of
                the public configs; -1 is the output of the last layer.

        Returns:
            (B, 1 + patches, D). Layers above the one asked for are not computed.
        """
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ValueError(f"the tower takes {size} x {size} pixels, got {tuple(pixels.shape)}")
        depth = layer if layer >= 0 else len(self.layers) + 1 + layer
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.position_embedding.weight
        x = self.pre_norm(x)
        for block in self.layers[:depth]:
            x = block(x)
        return x


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent parts on white, as transformers 5 does.

    Older releases and the original LLaVA drop the alpha channel, which reveals colours that no
    image viewer shows.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scale_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short edge to `size`, crop the middle; round as transformers' CLIP processor."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= 2 * Image.MAX_IMAGE_PIXELS:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    # Scaling a long strip would take gigabytes. Its middle alone costs nothing, but Pillow rounds
    # the box, so single values may differ by one level (of 255).
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def pad_and_scale(image: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Put the picture in the middle of a square of one colour, scaled to `size`."""
    side = max(image.size)
    if side * side > 2 * Image.MAX_IMAGE_PIXELS:  # the square of a long strip would take gigabytes
        width, height = (max(1, round(each * size / side)) for each in image.size)
        image, side = image.resize((width, height), Image.Resampling.BICUBIC), size
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def preprocess(
    image: Image.Image, size: int, mean=CLIP_MEAN, std=CLIP_STD, mode: str = "pad"
) -> Tensor:
    """Turn a picture into the tower's input.

    Args:
        image: any Pillow image, upright: whoever reads a file applies its EXIF rotation.
        size: side of the square result, in pixels.
        mean, std: per channel, of values in 0..1.
        mode: "pad" puts the picture in the middle of a square of the mean colour (LLaVA-1.5's own
            training and evaluation code); "crop" scales the short edge to `size` and cuts the
            middle out (the default processor of the llava-hf checkpoints).

    Returns:
        (3, size, size) float32. Equal to transformers' LlavaImageProcessor with `do_pad`, and to
        its CLIPImageProcessor.
    """
    image = to_rgb(image)
    if mode == "pad":
        image = pad_and_scale(image, size, tuple(int(channel * 255) for channel in mean))
    elif mode == "crop":
        image = scale_and_crop(image, size)
    else:
        raise ValueError(f"mode must be 'pad' or 'crop', got {mode!r}")
    values = np.asarray(image, dtype=np.float32) / 255.0  # (size, size, 3)
    values = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())
