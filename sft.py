"""The supervised stages: a tower that sees, and a model that describes and answers.

`--algo vision` pretrains the small tower of the built-in world on dense labels: which kind, colour,
number and cell lies under each patch, and which setting. Real LLaVA takes CLIP's tower ready-made;
learning to see from captions alone would need far more text than a laptop can read.

`--algo sft` maximises the mean log-probability of answers that are given (Liu et al. 2023, arXiv
2304.08485): of corrected answers, or of conversations.

`--algo base` does so for the built-in world's own model, from random words on. An image is a trunk,
and a noisy description and a dozen questions about it are its branches: the picture is read once for
all of them, and no answer can be copied from another. Some branches ask for a verdict on a statement,
with or without captions beside it.

`--algo judge` goes on from that base with what a reward model needs: to read, and to compare.
"""

from dataclasses import dataclass, replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import world
from config import Training, option
from data import Batch, Example, Response, Tokenizer, collate, prompt_tokens
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
class BaseConfig(Training):
    """For the built-in world's base, from random weights."""

    learning_rate: float = option(3e-3, "peak learning rate of AdamW (embeddings, head, norms)")
    muon_rate: float = option(0.02, "peak learning rate of Muon, for the blocks' matrices")
    optimizer: str = option("muon", "muon learns look-ups several times sooner", ("muon", "adamw"))
    steps: int = option(1100, "optimizer steps")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    questions: int = option(10, "questions per image, each a branch of its own")
    verdicts: int = option(2, "statements per image to be judged, half of them beside captions")
    scenes: int = option(12000, "different training scenes")


@dataclass
class JudgeConfig(Training):
    """For the built-in world's judge, on top of its base."""

    learning_rate: float = option(3e-3, "peak learning rate of AdamW (embeddings, head, norms)")
    muon_rate: float = option(0.02, "peak learning rate of Muon, for the blocks' matrices")
    optimizer: str = option("muon", "muon learns look-ups several times sooner", ("muon", "adamw"))
    micro_batch: int = option(16, "rows per forward pass; smaller needs less memory, same result")
    steps: int = option(1800, "optimizer steps")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    reading: float = option(0.55, "share of the steps that only teach to read; the rest to judge")
    easy: float = option(0.3, "share of those for judging in which the lessons become hard")
    fewer: float = option(0.33, "share of the false answers that say too much, not the wrong thing")
    pictures: float = option(0.25, "share of the judging rows with a picture")
    scenes: int = option(6000, "different training scenes")


@dataclass
class SFTConfig(Training):
    """For answers that somebody wrote, on top of a model that can already speak."""

    learning_rate: float = option(2e-5, "peak learning rate (LLaVA-1.5's)")


def supervised_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Negative weighted mean of the log-probabilities of what is learnt, (R,), (R,) -> scalar."""
    return -(weight * logp).sum() / weight.sum()


class SFT:
    """Supervised fine-tuning on examples with any number of responses each."""

    def __init__(self, model: LLaVA, config: BaseConfig | SFTConfig, source):
        """`source` has `steps` and `examples(step)`; see `WorldConversations` and `data.Epochs`."""
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


class WorldConversations:
    """Conversations about drawn scenes: the images are fixed, the questions new at every step."""

    def __init__(
        self, model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings,
        config: BaseConfig, seed: int,
    ):
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.steps = config.steps or -(-config.epochs * config.scenes // config.batch_size)
        self.scenes = [world.make_scene(f"sft {seed} {i}") for i in range(config.scenes)]
        self.texts = [world.annotate(s, Random(f"annotator {s.seed}")) for s in self.scenes]
        self.features = see(model, self.scenes, settings)
        self.seen = prompt_tokens(
            tokenizer, f"{data.SYSTEM} USER: {data.IMAGE}", model.config.vision.patches
        )

    def examples(self, step: int) -> list[Example]:
        rng = Random(f"conversations {self.seed} {step}")
        chosen = rng.sample(range(len(self.scenes)), self.config.batch_size)
        return [self.example(i, rng) for i in chosen]

    def example(self, i: int, rng: Random) -> Example:
        scene = self.scenes[i]
        describe = rng.choice(world.DESCRIBE_PROMPTS_TRAIN)
        turns = [(describe, self.texts[i])]
        turns += [(q.text, q.answer) for q in world.questions(scene, rng, self.config.questions)]
        for sentence, is_true in world.statements(scene, rng, self.config.verdicts):
            facts = world.facts(scene, rng) if rng.random() < 0.5 else []
            asked = f"{describe} ASSISTANT: {sentence} USER: {data.judging_request(facts)}"
            turns.append((asked, "Yes." if is_true else "No."))
        responses = [data.turn(self.tokenizer, f"\n{q} ASSISTANT:", a) for q, a in turns]
        return Example(f"scene {scene.seed}", self.features[i], self.seen, responses)


class WorldVerdicts:
    """Answers to be judged by captions or by the picture, as a reward model will see them.

    An answer is true if each thing it names is there. To compare, one first has to find in the
    answer what a caption speaks of. So the lessons begin with reading: to tell the facts from a
    description of a few things, or of many. (A base that cannot do that learns from verdicts only
    which words occur.) Then the verdicts: the false answers belong to lookalikes, which begin as
    different from the scene as can be and come to differ in one word, easy ones staying among them.
    Most rows have no picture: the trunk is an answer, and its branches bring the facts of the scene
    or of a lookalike; the facts of a true answer are still to be told.
    """

    HARDEST = 0.95  # of the way from all different to none

    def __init__(
        self, model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, config: JudgeConfig,
        seed: int,
    ):
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.steps, self.patches = config.steps, model.config.vision.patches
        self.scenes = [world.make_scene(f"judge {seed} {i}") for i in range(config.scenes)]
        self.features = see(model, self.scenes, settings)

    def examples(self, step: int) -> list[Example]:
        rng = Random(f"verdicts {self.seed} {step}")
        chosen = rng.sample(range(len(self.scenes)), self.config.batch_size)
        first = round(self.config.reading * self.steps)
        if step < first:
            lessons = [self.reading(self.scenes[i], rng) for i in chosen]
        else:
            easy = max(1.0, self.config.easy * (self.steps - first))  # steps until they are hard
            hardest = self.HARDEST * min(1.0, (step - first) / easy)
            lessons = [self.judging(i, hardest, rng) for i in chosen]
        return sorted(lessons, key=data.row_length)

    def reading(self, scene: world.Scene, rng: Random) -> Example:
        """Things in words or as captions, and three times their captions to be told from that."""
        scene = self.part(scene, rng)
        said = world.describe(scene)
        if rng.random() < 0.5:
            said = "; ".join(world.facts(scene, rng)) + "."
        facts = [self.request(world.facts(scene, rng)) for _ in range(3)]
        responses = [Response(tokens, [1.0] * len(tokens)) for tokens in facts]
        return self.written(scene, said, responses, rng)

    def judging(self, i: int, hardest: float, rng: Random) -> Example:
        if rng.random() >= self.config.pictures:
            scene = self.part(self.scenes[i], rng)
            responses = [
                self.verdict([], world.facts(shown, rng), shown == scene, reads=shown == scene)
                for shown in self.others(scene, hardest, rng)
            ]
            return self.written(scene, world.describe(scene), responses, rng)
        scene = self.scenes[i]
        facts = world.facts(scene, rng) if rng.random() < 0.7 else []
        responses = [
            self.verdict(self.tokenizer.encode(world.describe(said)), facts,
                         set(said.things) <= set(scene.things))
            for said in self.others(scene, hardest, rng)
        ]
        asked = data.prompt_text(rng.choice(world.DESCRIBE_PROMPTS_TRAIN))
        trunk = prompt_tokens(self.tokenizer, asked, self.patches)
        return Example(f"scene {scene.seed}", self.features[i], trunk, responses)

    def part(self, scene: world.Scene, rng: Random) -> world.Scene:
        """Some of the scene's things, two at least."""
        count = rng.randint(2, len(scene.things))
        return replace(scene, things=tuple(rng.sample(scene.things, count)))

    def written(self, scene: world.Scene, said: str, responses: list[Response], rng: Random) -> Example:
        """A row without picture: the trunk is a prompt and what was said."""
        asked = data.prompt_text(rng.choice(world.DESCRIBE_PROMPTS_TRAIN), image=False)
        trunk = prompt_tokens(self.tokenizer, asked, 0) + self.tokenizer.encode(said)
        return Example(f"scene {scene.seed}", None, trunk, responses)

    def others(self, scene: world.Scene, hardest: float, rng: Random) -> list[world.Scene]:
        """Four scenes, each the scene itself or, half of the time, a lookalike."""
        return [
            scene if rng.random() < 0.5 else world.lookalike(
                scene, rng, 1 - hardest * rng.random() ** 0.5, rng.random() < self.config.fewer)
            for _ in range(4)
        ]

    def request(self, facts: list[str]) -> list[int]:
        return self.tokenizer.encode(f"USER: {data.judging_request(facts)} ASSISTANT:")

    def verdict(
        self, answer: list[int], facts: list[str], is_true: bool, reads: bool = False
    ) -> Response:
        """A branch: an answer (or none), the request to judge it, and the verdict."""
        request = self.request(facts)
        learnt = 0.5 / len(request) if reads else 0.0  # all of the reading half a verdict's weight
        said = self.tokenizer.encode("Yes." if is_true else "No.")[:1]
        return Response(answer + request + said,
                        [0.0] * len(answer) + [learnt] * len(request) + [1.0])
