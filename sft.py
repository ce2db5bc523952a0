"""The supervised stages: a tower that sees, and a model that describes and answers.

`--algo vision` pretrains the small tower of the built-in world on dense labels: which kind, colour,
number and cell lies under each patch, and which setting. Real LLaVA takes CLIP's tower ready-made;
learning to see from captions alone would need far more text than a laptop can read.

`--algo sft` maximises the mean log-probability of answers that are given (Liu et al. 2023, arXiv
2304.08485): of corrected answers, or of conversations.

`--algo base` and `--algo judge` do so for the built-in world's own models; see `lessons.py`.
"""

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import world
from config import Training, option
from data import Batch, Tokenizer, collate
from model import LLaVA, LLaVAConfig, TextConfig
from vision import ImageSettings, VisionConfig, preprocess

WORLD_IMAGES = ImageSettings(size=72, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), mode="pad")


def world_model(tokenizer: Tokenizer) -> LLaVAConfig:
    """Shape of the built-in world's model: 0.8 M parameters to see, 2 M to speak.

    A decoder position has to find a patch by its content, from any distance. Rotary positions
    disturb that in all dimensions but the slow ones, so theta is large (as in LLaMA 3) and the
    heads are as wide as in the large models (64).
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


def world_texts(scenes: int = 300):
    """What the built-in world's tokenizer is trained on: a little of everything that is ever said."""
    rng = Random("tokenizer")
    for i in range(scenes):
        scene = world.make_scene(i)
        said = [(q.text, q.answer) for q in world.questions(scene, rng, 8)]
        said += [(prompt, world.annotate(scene, rng)) for prompt in world.DESCRIBE_PROMPTS_TRAIN]
        for prompt, answer in said:
            yield from (data.prompt_text(prompt, image=False), answer)
        yield data.judging_request(world.facts(scene, rng))


def draw_pixels(scenes: list[world.Scene], settings: ImageSettings) -> Tensor:
    """(N, 3, size, size) tower input of scenes."""
    return torch.stack([
        preprocess(world.draw(scene), settings.size, settings.mean, settings.std, settings.mode)
        for scene in scenes
    ])


@torch.no_grad()
def see(model: LLaVA, scenes: list[world.Scene], settings: ImageSettings) -> Tensor:
    """(N, patches, D_vision) features of scenes, from a tower that will not change."""
    parts = data.split(scenes, 100)
    return torch.cat([model.image_features(draw_pixels(part, settings)) for part in parts])


# ------------------------------------------------------------------------------------------- vision


@dataclass
class TowerConfig(Training):
    learning_rate: float = option(2e-3, "peak learning rate of AdamW")
    muon_rate: float = option(0.02, "peak learning rate of Muon, for the blocks' matrices")
    batch_size: int = option(64, "drawn scenes per step, each seen once", least=1)
    micro_batch: int = option(64, "scenes per forward pass", least=1)
    steps: int = option(500, "optimizer steps")
    optimizer: str = option("muon", "AdamW at the same rate sees 80 % of the kinds where Muon "
                            "sees 97 %", choices=("muon", "adamw"))


class Tower:
    """Dense pretraining of the built-in world's tower."""

    def __init__(self, model: LLaVA, config: TowerConfig, seed: int, settings: ImageSettings):
        self.model, self.config, self.seed, self.settings = model, config, seed, settings
        # Logits per patch for: kind or nothing, colour or none, number or none, cell; and setting.
        self.sizes = [len(world.KINDS) + 1, len(world.COLOURS) + 1, 4, 9, len(world.SCENES)]
        self.readout = nn.Linear(model.config.vision.hidden_size, sum(self.sizes))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.readout.weight, 0, 0.02, generator=generator)
        nn.init.zeros_(self.readout.bias)
        side = settings.size // model.config.vision.patch_size
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        self.cell = (rows * 3 // side * 3 + columns * 3 // side).flatten()  # (patches,)
        model.requires_grad_(False)
        model.vision_tower.requires_grad_(True)
        self.modules = nn.ModuleDict({"tower": model.vision_tower, "readout": self.readout})
        self.steps = config.steps

    def batches(self, step: int) -> list[tuple[Tensor, list[Tensor]]]:
        first = step * self.config.batch_size
        scenes = [
            world.make_scene(f"tower {self.seed} {i}")
            for i in range(first, first + self.config.batch_size)
        ]
        truth = [torch.tensor(column) for column in zip(*map(world.labels, scenes))]
        kind, colour, number = (column[:, self.cell] for column in truth[:3])  # (B, patches)
        labels = [kind, colour, number, self.cell.expand(len(scenes), -1), truth[3]]
        return [(draw_pixels(scenes, self.settings), labels)]

    def size(self, batch) -> int:
        return len(batch[0])

    def loss(self, batch) -> tuple[Tensor, dict[str, float]]:
        pixels, labels = batch
        features = self.model.image_features(pixels)
        logits = self.readout(features).split(self.sizes, dim=-1)  # each (B, patches, classes)
        per_patch = [logit.flatten(0, 1) for logit in logits[:4]]
        losses = [F.cross_entropy(p, t.flatten()) for p, t in zip(per_patch, labels)]
        losses.append(F.cross_entropy(logits[4].mean(1), labels[4]))
        thing = labels[0] > 0
        right = (logits[0].argmax(-1) == labels[0])[thing].float().mean()
        # Unit-sized features: the projector's input, as after CLIP's own training.
        size = features.square().mean()
        return sum(losses) + 0.01 * size, {"accuracy/kind": right.item(), "features": size.item()}


# ---------------------------------------------------------------------------------------------- SFT


@dataclass
class SFTConfig(Training):
    """For answers that somebody wrote, on top of a model that can already speak."""

    learning_rate: float = option(2e-5, "peak learning rate (LLaVA-1.5's)")


def supervised_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Negative weighted mean of the log-probabilities of what is learnt, (R,), (R,) -> scalar."""
    return -(weight * logp).sum() / weight.sum()


class SFT:
    """Supervised fine-tuning on examples with any number of responses each."""

    def __init__(self, model: LLaVA, config: Training, source):
        """`source` has `steps` and `examples(step)`; see `data.Epochs` and `lessons.py`."""
        self.model, self.config, self.source = model, config, source
        self.modules = nn.ModuleDict({"model": model})
        self.steps = source.steps

    def batches(self, step: int) -> list[Batch]:
        context = self.model.config.text.max_position_embeddings
        return [
            collate(examples, self.model.config.pad_token, context)
            for examples in data.split(self.source.examples(step), self.config.micro_batch)
        ]

    def size(self, batch: Batch) -> float:
        return batch.weight.sum().item()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        hidden = self.model(batch.images, batch.tokens, batch.position, batch.branch)
        logp = self.model.head(hidden.flatten(0, 1)[batch.source], batch.target)
        return supervised_loss(logp, batch.weight), {"padding": batch.padding}
