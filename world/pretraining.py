"""Pretraining of the built-in world's own models: three algorithms, in this order.

    vision    dense labels of every patch, from random weights. Real LLaVA takes CLIP's tower
              ready-made; captions alone would need far more text than a laptop can process.
    base      conversations about drawn scenes, after vision
    rm_init   verification of answers against facts, after base

`tasks.py` makes the examples; README.md says how the shipped models were made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import generation
import sft
import world
from algorithm import Algorithm, Data, Start
from config import Training, option
from formats.tokenizer import Tokenizer, train_tokenizer
from model import LLaVA, LLaVAConfig, TextConfig, add_layers, init_weights
from vision import ImageSettings, VisionConfig
from world.tasks import ConversationTask, VerificationTask

WORLD_IMAGES = ImageSettings(size=72, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), mode="pad")


def world_model(tokenizer: Tokenizer) -> LLaVAConfig:
    """Return the world's configuration: 0.8 M parameters in the tower, 2 M in the decoder.

    A decoder position has to find a patch by its content, at any distance. Rotary positions disturb
    that in all but the slow dimensions, so theta is large (as in LLaMA 3) and heads are wide (64).
    """
    return LLaVAConfig(
        vision=VisionConfig(128, 512, 4, 4, image_size=72, patch_size=12),
        text=TextConfig(
            tokenizer.vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512,
            rope_theta=1e6,
        ),
        image_token=tokenizer.image_token, pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token, vision_feature_layer=-1,
    )


def world_texts(scenes: int = 300) -> Iterator[str]:
    """Yield the training texts of the world's tokenizer: samples of every kind of text."""
    rng = Random("tokenizer")
    for i in range(scenes):
        scene = world.make_scene(i)
        turns = [(q.text, q.answer) for q in world.questions(scene, rng, 8)]
        turns += [(prompt, world.annotate(scene, rng)) for prompt in world.DESCRIBE_PROMPTS_TRAIN]
        for prompt, answer in turns:
            yield from (data.prompt_text(prompt, image=False), answer)
        yield data.reward_request(world.facts(scene))


def fresh_model(path: Path, seed: int) -> tuple[LLaVA, Tokenizer, ImageSettings]:
    """Return the world's model with random weights, its tokenizer and its image settings.

    Args:
        path: of the tokenizer, which is trained and written if the file is missing.
        seed: of the weights.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(world_texts(), path)
    tokenizer = Tokenizer(path)
    model = LLaVA(world_model(tokenizer))
    init_weights(model, seed)
    return model, tokenizer, WORLD_IMAGES


# ------------------------------------------------------------------------------------- vision tower


@dataclass
class TowerConfig(Training):
    learning_rate: float = option(2e-3, "peak learning rate of AdamW")
    muon_rate: float = option(0.02, "peak learning rate of Muon, for the blocks' matrices")
    batch_size: int = option(64, "drawn scenes per step, each used once", least=1)
    micro_batch: int = option(64, "scenes per forward pass", least=1)
    steps: int = option(500, "optimizer steps", least=1)
    optimizer: str = option("muon", "AdamW at the same rate recognises 80 % of the kinds, "
                            "Muon 97 %", choices=("muon", "adamw"))


@dataclass
class TowerBatch:
    """Drawn scenes, and the classes of their patches."""

    pixels: Tensor  # (B, 3, H, W)
    labels: list[Tensor]  # kind, colour, number, cell: each (B, patches) long; setting: (B,) long
    names: list[str]  # (B,)
    counts: bool = True  # see data.Batch

    def to(self, device: torch.device) -> "TowerBatch":
        return replace(
            self, pixels=self.pixels.to(device), labels=[label.to(device) for label in self.labels])


class Tower(Algorithm):
    """Pretrain the vision tower to classify the kind, colour, number and cell of every patch."""

    Config, reads, first = TowerConfig, "", ()

    def __init__(self, start: Start, config: TowerConfig, data: Data | None):
        self.model, self.config, self.settings = start.model, config, start.images
        self.seed, self.steps = start.run.seed, config.steps
        # Logits per patch for: kind or nothing, colour or none, number or none, cell; and setting.
        self.sizes = [len(world.KINDS) + 1, len(world.COLOURS) + 1, 4, 9, len(world.SCENES)]
        self.readout = nn.Linear(self.model.config.vision.hidden_size, sum(self.sizes))
        generator = torch.Generator().manual_seed(self.seed)
        nn.init.normal_(self.readout.weight, 0, 0.02, generator=generator)
        nn.init.zeros_(self.readout.bias)
        self.readout.to(start.device)
        side = start.images.size // self.model.config.vision.patch_size
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        self.cell = (rows * 3 // side * 3 + columns * 3 // side).flatten()  # (patches,)
        self.model.vision_tower.requires_grad_(True)
        self.modules = nn.ModuleDict({"tower": self.model.vision_tower, "readout": self.readout})

    def batches(self, step: int) -> list[TowerBatch]:
        first = step * self.config.batch_size
        names = [f"tower {self.seed} {i}" for i in range(first, first + self.config.batch_size)]
        return [self.batch(part) for part in data.split(names, self.config.micro_batch)]

    def batch(self, names: list[str]) -> TowerBatch:
        """Draw the scenes of these seeds and label every patch with the thing in its cell."""
        scenes = [world.make_scene(name) for name in names]
        truth = [torch.tensor(column) for column in zip(*map(world.labels, scenes))]
        kind, colour, number = (column[:, self.cell] for column in truth[:3])  # (B, patches)
        labels = [kind, colour, number, self.cell.expand(len(scenes), -1), truth[3]]
        pixels = generation.pixels_of([world.draw(scene) for scene in scenes], self.settings)
        return TowerBatch(pixels, labels, names)

    def loss(self, batch: TowerBatch) -> tuple[Tensor, dict[str, float]]:
        features = self.model.image_features(batch.pixels)
        logits = self.readout(features).split(self.sizes, dim=-1)  # each (B, patches, classes)
        per_patch = [logit.flatten(0, 1) for logit in logits[:4]]
        losses = [F.cross_entropy(p, t.flatten()) for p, t in zip(per_patch, batch.labels)]
        losses.append(F.cross_entropy(logits[4].mean(1), batch.labels[4]))
        thing = batch.labels[0] > 0
        right = (logits[0].argmax(-1) == batch.labels[0])[thing].float().mean()
        # Keep the features, which the projector reads, at unit size, as CLIP's training does.
        size = features.square().mean()
        return sum(losses) + 0.01 * size, {"accuracy/kind": right.item(), "features": size.item()}

    def measure(self, *measures: Callable) -> None:
        """Measure nothing: a tower alone describes nothing."""


# ----------------------------------------------------------- base and reward-model initialisation


@dataclass
class DecoderConfig(Training):
    """Hyperparameters of the base and of the initialisation that follows it."""

    learning_rate: float = option(3e-3, "peak learning rate of AdamW (embeddings, head, norms)")
    muon_rate: float = option(0.02, "peak learning rate of Muon, for the blocks' matrices")
    optimizer: str = option("muon", "Muon learns look-ups several times faster", ("muon", "adamw"))
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")


@dataclass
class BaseConfig(DecoderConfig):
    """Hyperparameters of the base."""

    steps: int = option(1100, "optimizer steps", least=1)
    questions: int = option(10, "questions per image, each in its own branch", least=0)


@dataclass
class RMInitConfig(DecoderConfig):
    """Hyperparameters of the reward model's initialisation, on top of the base."""

    learning_rate: float = option(1.5e-3, "peak learning rate of AdamW (embeddings, head, norms)")
    muon_rate: float = option(0.015, "peak learning rate of Muon, for the blocks' matrices")
    micro_batch: int = option(
        16, "rows per forward pass; smaller needs less memory, same result", least=1)
    steps: int = option(1200, "optimizer steps", least=1)
    layers: int = option(2, "decoder layers put on top of the base's: comparison needs more depth "
                         "than description")
    soften: float = option(0.5, "factor on the base's queries and keys; 1 for a later part of the "
                                "curriculum")
    reading: float = option(0.32, "share of the steps, the first ones, that teach reading; 1 or 0 "
                            "for a run of one part of the curriculum")
    comparing: float = option(0.3, "share of the steps, the next ones, that compare fact by fact, "
                              "to prepare verdicts on whole answers")


def soften(model: LLaVA, factor: float) -> None:
    """Scale the decoder's queries and keys by a factor, and so its attention scores by its square.

    The base attends to single tokens with a weight near 1. Where softmax is saturated, no gradient
    shows which other token would help.
    """
    with torch.no_grad():
        for block in model.decoder.layers:
            block.self_attn.q_proj.weight *= factor
            block.self_attn.k_proj.weight *= factor


class Base(sft.SFT):
    """Pretrain the base on noisy descriptions of drawn scenes and on questions about them."""

    Config, reads, first = BaseConfig, "", ("vision",)

    def __init__(self, start: Start, config: BaseConfig, data: Data | None):
        super().__init__(start, config, source=ConversationTask(start, config))

    def measure(self, *measures: Callable) -> None:
        """Measure nothing; evaluate.py measures the result."""


class RMInit(sft.SFT):
    """Initialise the reward model: train the base, with more layers, to verify answers by facts."""

    Config, reads, first = RMInitConfig, "", ("base",)

    def __init__(self, start: Start, config: RMInitConfig, data: Data | None):
        soften(start.model, config.soften)
        add_layers(start.model, config.layers, start.run.seed)
        super().__init__(start, config, source=VerificationTask(start, config))

    def measure(self, *measures: Callable) -> None:
        """Measure nothing; the reward model that starts from this one is measured."""
