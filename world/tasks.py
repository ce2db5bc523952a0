"""Training examples for the world's own models: conversations, and verification against facts.

A task is a source of examples for `sft.SFT`: it has `steps`, and `examples(step)` gives the rows of
an optimizer step. The shipped models were made with the seed strings below; other strings would
draw other scenes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from random import Random

from torch import Tensor

import data
import generation
import world
from algorithm import Start
from config import Training
from data import Example, Response
from formats.tokenizer import IMAGE
from model import LLaVA
from vision import ImageSettings


def encode_scenes(model: LLaVA, scenes: list[world.Scene], settings: ImageSettings) -> Tensor:
    """Return the frozen tower's features of scenes, (N, patches, D_vision)."""
    pictures = [world.draw(scene) for scene in scenes]
    return generation.image_features(model, settings, pictures, batch_size=100)


class ConversationTask:
    """Conversations about drawn scenes: the images are fixed, the questions new at every step.

    An image is a trunk; a noisy description, questions and statements to verify are its branches.
    So the image is processed once for all of them, and no answer can be copied from another.
    """

    SCENES = 12000  # distinct scenes, at most; their features take 0.2 GB
    STATEMENTS = 2  # to verify per image, half of them with facts, as a reward model does

    def __init__(self, start: Start, config: Training):
        self.tokenizer, self.seed = start.tokenizer, start.run.seed
        self.steps, self.batch_size = config.steps, config.batch_size
        self.questions = config.questions
        count = min(self.SCENES, self.steps * self.batch_size)
        self.scenes = [world.make_scene(f"sft {self.seed} {i}") for i in range(count)]
        self.texts = [world.annotate(s, Random(f"annotator {s.seed}")) for s in self.scenes]
        self.features = encode_scenes(start.model, self.scenes, start.images)
        self.trunk = data.prompt_tokens(
            self.tokenizer, f"{data.SYSTEM} USER: {IMAGE}", start.model.config.vision.patches)

    def examples(self, step: int) -> list[Example]:
        rng = Random(f"conversations {self.seed} {step}")
        chosen = rng.sample(range(len(self.scenes)), self.batch_size)
        return [self.example(i, rng) for i in chosen]

    def example(self, i: int, rng: Random) -> Example:
        """Ask about scene `i`: one response for each question and statement."""
        scene = self.scenes[i]
        describe = rng.choice(world.DESCRIBE_PROMPTS_TRAIN)
        turns = [(describe, self.texts[i])]
        turns += [(q.text, q.answer) for q in world.questions(scene, rng, self.questions)]
        for sentence, is_true in world.statements(scene, rng, self.STATEMENTS):
            facts = world.facts(scene) if rng.random() < 0.5 else []
            asked = f"{describe} ASSISTANT: {sentence} USER: {data.reward_request(facts)}"
            turns.append((asked, "Yes." if is_true else "No."))
        responses = [data.turn(self.tokenizer, f"\n{q} ASSISTANT:", a) for q, a in turns]
        return Example(f"scene {scene.seed}", self.features[i], self.trunk, responses)


class VerificationTask:
    """Verification of answers against captions or the image, as a reward model does it.

    An answer is true if it names what is there, as it is, and nothing else. To compare, the model
    must first find the part of the answer that a caption is about. Hence three phases:

    1. reading: write the facts of a description of a few things, or of many. Kinds weigh most,
       because the model learns last to read them where they stand;
    2. comparing: after each fact of a reward request, say whether the answer states it. A verdict
       on each fact teaches in minutes what one verdict on all of them does not;
    3. verifying: give a verdict on the whole answer, "yes" less often the more of it is false,
       while some responses still compare fact by fact.

    False answers describe lookalikes of the scene, at first as different from it as possible, later
    down to one word, with easy ones still among them. Most rows have no image: the trunk is an
    answer, and its branches give the facts of the scene or of a lookalike.
    """

    FACT_BY_FACT = 0.3  # share of phase 3's responses that still compare fact by fact
    RAMP = 0.15  # share of the steps after phase 1 over which lookalikes become hard: comparison is
    # learned from obvious errors and needed for small ones
    HARDEST = 0.95  # similarity of the hardest lookalikes, 0 (everything differs) to 1
    HABITS = 0.4  # share of the hardest lookalikes that err as the noisy annotator, and so the
    # base, does: one of the two scenes is the annotator's report of the other
    REPEATED = 0.3  # share of the reports in which a thing stands twice, which only the base does
    EXCHANGED = 0.3  # share of the others that differ in kinds or in places alone: the words
    # of a fact do not suffice then, only where they stand in the answer
    EXTRA = 0.25  # share of the rest in which the answer states too much
    IMAGES = 0.4  # share of phase 3's rows with an image; those without are shorter
    KIND_WEIGHT, WEIGHT = 4.0, 0.25  # in phase 1, of kinds and of the rest; number and colour: 1
    IF_TRUE, PER_ERROR = 0.9, 0.4  # P(yes) of a true answer, and its factor for each kind that it
    # leaves out, makes up or describes wrongly; so log-odds also rank two false answers
    VERDICT_WEIGHT = 5.0  # of a verdict on the whole answer; 1 on a fact
    FACT_WEIGHT = 0.25  # of a stated fact's tokens; at 0 the model unlearns reading
    SCENES = 6000  # distinct scenes, at most

    def __init__(self, start: Start, config: Training):
        self.tokenizer, self.seed = start.tokenizer, start.run.seed
        self.steps, self.batch_size = config.steps, config.batch_size
        self.reading, self.comparing = config.reading, config.comparing  # shares of the steps
        self.patches = start.model.config.vision.patches
        count = min(self.SCENES, self.steps * self.batch_size)
        self.scenes = [world.make_scene(f"judge {self.seed} {i}") for i in range(count)]
        self.features = encode_scenes(start.model, self.scenes, start.images)
        encode = self.tokenizer.encode
        self.ends = {encode(f"it{sign}")[-1] for sign in ";."}  # of the facts in a reward request
        self.yes, self.no = (encode(word)[0] for word in ("Yes.", "No."))
        token = lambda word: encode(f"on {word}")[-1]
        self.weight = {token(noun): self.KIND_WEIGHT for noun in world.NOUNS}
        self.weight |= {token(word): 1.0 for word in (*world.COLOURS, "a", "two", "three")}

    def examples(self, step: int) -> list[Example]:
        rng = Random(f"verdicts {self.seed} {step}")
        chosen = rng.sample(range(len(self.scenes)), self.batch_size)
        first = round(self.reading * self.steps)
        if step < first:
            rows = [self.read(self.scenes[i], rng) for i in chosen]
        else:
            comparing = step < first + round(self.comparing * self.steps)
            ramp = max(1.0, self.RAMP * (self.steps - first))  # steps until lookalikes are hard
            hardest = self.HARDEST * min(1.0, (step - first) / ramp)
            verify = self.compare if comparing else self.verify
            rows = [verify(i, hardest, rng) for i in chosen]
        return sorted(rows, key=data.row_length)

    def read(self, scene: world.Scene, rng: Random) -> Example:
        """Phase 1: a description or a list of captions, and its facts in three random orders."""
        scene = self.part(scene, rng)
        facts = world.facts(scene)
        shuffled = [rng.sample(facts, len(facts)) for _ in range(4)]
        answer = world.describe(scene)
        if rng.random() < 0.5:
            answer = "; ".join(shuffled.pop()) + "."
        requests = [self.request(order) for order in shuffled[:3]]
        responses = [Response(tokens, [self.weight.get(token, self.WEIGHT) for token in tokens])
                     for tokens in requests]
        return self.text_row(scene, answer, responses, rng)

    def compare(self, i: int, hardest: float, rng: Random) -> Example:
        """Phase 2: an answer, and four lists of facts to compare with it one by one."""
        return self.without_image(self.scenes[i], hardest, 1.0, rng)

    def verify(self, i: int, hardest: float, rng: Random) -> Example:
        """Phase 3: four responses about the image, or about an answer in its place."""
        scene = self.scenes[i]
        if rng.random() >= self.IMAGES:
            return self.without_image(scene, hardest, self.FACT_BY_FACT, rng)
        facts = world.facts(scene) if rng.random() < 0.7 else []
        responses = []
        reported = self.reported(scene, rng)
        for answered in self.versions(scene, hardest, world.extended, reported, rng):
            answer = self.tokenizer.encode(world.describe(answered))
            if facts and rng.random() < self.FACT_BY_FACT:
                responses.append(self.fact_verdicts(answer, facts, answered))
            else:
                responses.append(self.verdict(answer, facts, answered, scene, rng))
        asked = data.prompt_text(rng.choice(world.DESCRIBE_PROMPTS_TRAIN))
        trunk = data.prompt_tokens(self.tokenizer, asked, self.patches)
        return Example(f"scene {scene.seed}", self.features[i], trunk, responses)

    def without_image(
        self, scene: world.Scene, hardest: float, fact_by_fact: float, rng: Random
    ) -> Example:
        """Make a row whose trunk is an answer, and whose responses are facts and verdicts."""
        truth = self.part(scene, rng, 4)
        scene, responses = self.reported(truth, rng), []
        fewer = partial(world.lookalike, fewer=True)
        for shown in self.versions(scene, hardest, fewer, truth, rng):
            if rng.random() < fact_by_fact:
                responses.append(self.fact_verdicts([], world.facts(shown), scene))
            else:
                responses.append(self.verdict([], world.facts(shown), scene, shown, rng))
        return self.text_row(scene, world.describe(scene), responses, rng)

    def part(self, scene: world.Scene, rng: Random, most: int = 5) -> world.Scene:
        """Keep a random two to `most` of the scene's things."""
        count = rng.randint(2, min(most, len(scene.things)))
        return replace(scene, things=tuple(rng.sample(scene.things, count)))

    def reported(self, scene: world.Scene, rng: Random) -> world.Scene:
        """Return what the noisy annotator reports, sometimes with a thing in two places."""
        scene = world.misreported(scene, rng)
        again = rng.random() < self.REPEATED and len(scene.free_cells()) > 1
        return world.repeated(scene, rng) if again else scene

    def text_row(
        self, scene: world.Scene, answer: str, responses: list[Response], rng: Random
    ) -> Example:
        """Make a row without image: the trunk is a prompt and an answer."""
        asked = data.prompt_text(rng.choice(world.DESCRIBE_PROMPTS_TRAIN), image=False)
        trunk = data.prompt_tokens(self.tokenizer, asked, 0) + self.tokenizer.encode(answer)
        return Example(f"scene {scene.seed}", None, trunk, responses)

    def versions(
        self, scene: world.Scene, hardest: float, extra: Callable, habitual: world.Scene,
        rng: Random,
    ) -> Iterator[world.Scene]:
        """Yield four scenes, each the scene itself or, half of the time, a lookalike.

        Args:
            extra: makes lookalikes with which the answer states too much.
            habitual: the noisy annotator's report of the scene, or what the scene is a report of.
        """
        for _ in range(4):
            difference = 1 - hardest * rng.random() ** 0.5
            if rng.random() < 0.5:
                yield scene
            elif rng.random() < self.HABITS * hardest:
                yield habitual
            elif rng.random() < self.EXCHANGED:
                yield world.exchanged(scene, rng, difference, rng.choice(("kind", "cell")))
            else:
                change = extra if rng.random() < self.EXTRA else world.lookalike
                yield change(scene, rng, difference)

    def request(self, facts: list[str]) -> list[int]:
        return self.tokenizer.encode(f"USER: {data.reward_request(facts)} ASSISTANT:")

    def verdict(
        self, answer: list[int], facts: list[str], answered: world.Scene, shown: world.Scene,
        rng: Random,
    ) -> Response:
        """Make a response of an answer (or none), the reward request, and the verdict.

        Args:
            answered: the scene that the answer, here or in the trunk, describes.
            shown: the scene in the image and in the facts.
        """
        errors = len({thing.kind for thing in set(answered.things) ^ set(shown.things)})
        is_yes = rng.random() < self.IF_TRUE * self.PER_ERROR ** errors
        tokens = answer + self.request(facts) + [self.yes if is_yes else self.no]
        return Response(tokens, [0.0] * (len(tokens) - 1) + [self.VERDICT_WEIGHT])

    def fact_verdicts(
        self, answer: list[int], facts: list[str], answered: world.Scene
    ) -> Response:
        """Make a response of an answer (or none), the request, and a verdict after each fact.

        Args:
            answered: the scene that the answer, here or in the trunk, describes.
        """
        true = world.facts(answered)
        verdicts = iter([fact in true for fact in facts])
        tokens, weight = list(answer), [0.0] * len(answer)
        for token in self.tokenizer.encode(f"USER: {data.reward_request(facts)}"):
            tokens.append(token)
            if token in self.ends:
                is_stated = next(verdicts)
                weight += [self.FACT_WEIGHT * is_stated] * (len(tokens) - len(weight)) + [1.0]
                tokens.append(self.yes if is_stated else self.no)
        return Response(tokens, weight)
