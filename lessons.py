"""What the built-in world's own models are taught, example by example; `sft.py` does the teaching.

`--algo base`: an image is a trunk, and a noisy description and a dozen questions about it are its
branches: the picture is read once for all of them, and no answer can be copied from another. Some
branches ask for a verdict on a statement, with or without captions beside it.

`--algo judge` goes on from that base with what a reward model needs: to read, and to compare.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import data
import world
from config import Training, option
from data import Example, Response, Tokenizer, prompt_tokens
from model import LLaVA
from sft import see
from vision import ImageSettings


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

    learning_rate: float = option(2e-3, "peak learning rate of AdamW (embeddings, head, norms)")
    muon_rate: float = option(0.015, "peak learning rate of Muon, for the blocks' matrices")
    optimizer: str = option("muon", "muon learns look-ups several times sooner", ("muon", "adamw"))
    micro_batch: int = option(16, "rows per forward pass; smaller needs less memory, same result")
    steps: int = option(2400, "optimizer steps")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    layers: int = option(2, "decoder layers put on top of the base's: comparing takes more steps of "
                         "thought than describing")
    reading: float = option(0.32, "share of the steps that only teach to read")
    comparing: float = option(0.42, "share of the steps after those that only teach to compare")
    marked: float = option(0.5, "share of the lessons in judging that compare fact by fact")
    easy: float = option(0.15, "share of the steps after reading in which the lessons become hard")
    fewer: float = option(0.33, "share of the false answers that say too much, not the wrong thing")
    pictures: float = option(0.33, "share of the judging rows with a picture")
    scenes: int = option(6000, "different training scenes")


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
    answer what a caption speaks of. So the lessons begin with *reading*: to tell the facts from a
    description of a few things, or of many. Then *comparing*: after each fact of a request to
    judge, whether the answer says so; a verdict for each fact teaches in minutes what one verdict
    on all of them does not. At last *judging*: verdicts on whole answers, some facts still compared.

    False answers belong to lookalikes, which begin as different from the scene as can be and come
    to differ in one word, easy ones staying among them. Most rows have no picture: the trunk is an
    answer, and its branches bring the facts of the scene or of a lookalike.
    """

    HARDEST = 0.95  # of the way from all different to none
    READING = 0.25  # weight of a token of a fact that is said, beside the verdict on the fact

    def __init__(
        self, model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, config: JudgeConfig,
        seed: int,
    ):
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.steps, self.patches = config.steps, model.config.vision.patches
        self.scenes = [world.make_scene(f"judge {seed} {i}") for i in range(config.scenes)]
        self.features = see(model, self.scenes, settings)
        self.ends = {tokenizer.encode(f"it{sign}")[-1] for sign in ";."}  # of a fact in a request
        self.yes, self.no = (tokenizer.encode(word)[0] for word in ("Yes.", "No."))

    def examples(self, step: int) -> list[Example]:
        rng = Random(f"verdicts {self.seed} {step}")
        chosen = rng.sample(range(len(self.scenes)), self.config.batch_size)
        first = round(self.config.reading * self.steps)
        if step < first:
            lessons = [self.reading(self.scenes[i], rng) for i in chosen]
        else:
            second = first + round(self.config.comparing * self.steps)
            easy = max(1.0, self.config.easy * (self.steps - first))  # steps until they are hard
            hardest = self.HARDEST * min(1.0, (step - first) / easy)
            marked = 1.0 if step < second else self.config.marked
            lessons = [self.judging(i, hardest, marked, rng) for i in chosen]
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

    def judging(self, i: int, hardest: float, marked: float, rng: Random) -> Example:
        """Four branches, each with a verdict on all facts or (`marked` of them) on every fact."""
        scene = self.scenes[i]
        if marked == 1.0 or rng.random() >= self.config.pictures:
            scene = self.part(scene, rng)
            responses = []
            for shown, other in self.others(scene, hardest, rng):
                if rng.random() < marked:
                    responses.append(self.compared([], world.facts(other, rng), scene))
                else:
                    responses.append(self.verdict([], world.facts(shown, rng), shown == scene))
            return self.written(scene, world.describe(scene), responses, rng)
        facts = world.facts(scene, rng) if rng.random() < 0.7 else []
        responses = []
        for said, other in self.others(scene, hardest, rng):
            if facts and rng.random() < marked:
                answer = self.tokenizer.encode(world.describe(other))
                responses.append(self.compared(answer, facts, other))
            else:
                answer = self.tokenizer.encode(world.describe(said))
                is_true = set(said.things) <= set(scene.things)
                responses.append(self.verdict(answer, facts, is_true))
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

    def others(
        self, scene: world.Scene, hardest: float, rng: Random
    ) -> Iterator[tuple[world.Scene, world.Scene]]:
        """Four times a scene to be judged (half of them lookalikes), and a lookalike to compare."""
        for _ in range(4):
            other = world.lookalike(
                scene, rng, 1 - hardest * rng.random() ** 0.5, rng.random() < self.config.fewer)
            yield (scene if rng.random() < 0.5 else other), other

    def request(self, facts: list[str]) -> list[int]:
        return self.tokenizer.encode(f"USER: {data.judging_request(facts)} ASSISTANT:")

    def verdict(self, answer: list[int], facts: list[str], is_true: bool) -> Response:
        """A branch: an answer (or none), the request to judge it, and the verdict."""
        tokens = answer + self.request(facts) + [self.yes if is_true else self.no]
        return Response(tokens, [0.0] * (len(tokens) - 1) + [1.0])

    def compared(self, answer: list[int], facts: list[str], said: world.Scene) -> Response:
        """A branch: an answer (or none) and the request, after each fact whether `said` has it."""
        true = world.facts(said, Random(0))
        marks = iter([fact in true for fact in facts])
        tokens, weight = list(answer), [0.0] * len(answer)
        for token in self.tokenizer.encode(f"USER: {data.judging_request(facts)}"):
            tokens.append(token)
            if token in self.ends:
                is_said = next(marks)
                weight += [self.READING * is_said] * (len(tokens) - len(weight)) + [1.0]
                tokens.append(self.yes if is_said else self.no)
        return Response(tokens, weight)
