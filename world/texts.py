"""Texts about a scene: true descriptions and captions, and what a noisy annotator writes.

The wording follows from the scene's seed, so two texts about one scene differ only in what they
state. The annotator writes from habit: they report a thing that the setting usually has in its
usual place, even if nothing stands there, an unusual colour as the usual one, and three as two.
False sentences are worded and ordered like true ones, so no text gives them away.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from world.scenes import (
    COLOURS, KINDS, NUMBERS, PLACES, SCENES, USUAL_CELLS, Scene, Thing, in_reading_order,
)

OPENINGS = ("The picture shows a {}.", "This is a picture of a {}.", "This is a {}.")
SENTENCES = (  # place first: a model this small names a thing by looking at where it stands
    "{place} there {be} {thing}.", "{place} you can see {thing}.", "{place} you see {thing}.",
)
DESCRIBE_PROMPTS_TRAIN = (
    "Describe the picture.", "What can you see in the picture?", "Tell me what you see.",
    "What is in this picture? Tell me everything.", "Look at the picture and describe it.",
    "Give a long description of this picture.", "Describe everything that you see.",
    "Please tell me about this picture.", "Describe what is in this picture.",
    "Look at this. What do you see?", "Can you describe this picture?",
    "Please give a description of what you see.", "Tell me about everything that is in it.",
    "Please look at the picture and tell me everything.",
)
DESCRIBE_PROMPTS_EVAL = (  # other wordings, but no word that the training prompts lack
    "Please describe this picture.", "Tell me everything about the picture.",
    "Please tell me everything that you see.", "Look at this picture and give a description of it.",
    "Give a description of everything you see.", "Describe what you see in the picture.",
    "Please look at this picture. What is in it?", "Tell me about everything in this picture.",
)
EXPECTED = 4  # of a setting's most popular kinds; the annotator expects to see these


@dataclass(frozen=True)
class Rates:
    """How often the annotator writes from habit; every field is a probability."""

    missing_object: float = 0.95  # per expected kind that is absent, if its usual cell is empty:
    # one of that kind there, in its usual colour
    usual_colour: float = 0.4  # per thing in an unusual colour: the usual colour instead
    three_as_two: float = 0.4  # per thing of number three: "two"
    two_as_one: float = 0.15  # per thing of number two: "a"
    wrong_place: float = 0.1  # per thing: the place above, below, left or right of the true one


# ------------------------------------------------------------------------------------------ grammar


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def noun(thing: Thing) -> str:
    return thing.kind if thing.number == 1 else plural(thing.kind)


def be(thing: Thing) -> str:
    return "is" if thing.number == 1 else "are"


def phrase(thing: Thing) -> str:
    """Return the noun phrase: "a red car", "two red cars"."""
    number = "a" if thing.number == 1 else NUMBERS[thing.number]
    return f"{number} {thing.colour} {noun(thing)}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -------------------------------------------------------------------------------------------- texts


def sentence(thing: Thing, template: str) -> str:
    """Write one of the SENTENCES about a thing, which states all its attributes."""
    return capital(template.format(be=be(thing), thing=phrase(thing), place=PLACES[thing.cell]))


def describe_things(scene: Scene, things: Mapping[int, Thing]) -> str:
    """Write the scene's opening and a sentence for each of `things`, in reading order.

    Args:
        things: by the cell that decides the order and wording of their sentences.
    """
    rng = Random(f"words {scene.seed}")
    sentences = [rng.choice(OPENINGS).format(scene.type)]
    templates = rng.choices(SENTENCES, k=len(PLACES))
    sentences += [sentence(things[cell], templates[cell]) for cell in sorted(things)]
    return " ".join(sentences)


def describe(scene: Scene) -> str:
    """Write a true and complete description, 25 to 55 words."""
    return describe_things(scene, {thing.cell: thing for thing in scene.things})


def annotate(scene: Scene, rng: Random, rates: Rates = Rates()) -> str:
    """Write the noisy annotator's description: the true one, with the habits that `Rates` lists."""
    return describe_things(scene, reported(scene, rng, rates))


def reported(scene: Scene, rng: Random, rates: Rates = Rates()) -> dict[int, Thing]:
    """Return the things that the noisy annotator reports, by the cell that places the sentence."""
    things = {thing.cell: misreport(thing, rng, rates) for thing in scene.things}
    popular = SCENES[scene.type]
    expected = sorted(popular, key=popular.__getitem__, reverse=True)[:EXPECTED]
    for kind in scene.absent(expected):
        cell = USUAL_CELLS[kind]
        if cell not in things and rng.random() < rates.missing_object:
            things[cell] = Thing(kind, KINDS[kind], 1, cell)
    return things


def misreported(scene: Scene, rng: Random) -> Scene:
    """Return the scene that the noisy annotator describes; of two things in one cell, the last."""
    things = {thing.cell: thing for thing in reported(scene, rng).values()}
    return replace(scene, things=in_reading_order(things.values()))


def misreport(thing: Thing, rng: Random, rates: Rates) -> Thing:
    """Return the thing as the annotator reports it."""
    if thing.colour != KINDS[thing.kind] and rng.random() < rates.usual_colour:
        thing = replace(thing, colour=KINDS[thing.kind])
    if rng.random() < {1: 0, 2: rates.two_as_one, 3: rates.three_as_two}[thing.number]:
        thing = replace(thing, number=thing.number - 1)
    if rng.random() < rates.wrong_place:
        row, column = divmod(thing.cell, 3)
        near = [c for c in range(9) if abs(c // 3 - row) + abs(c % 3 - column) == 1]
        thing = replace(thing, cell=rng.choice(near))
    return thing


def facts(scene: Scene) -> list[str]:
    """Write short true captions, sorted: one for the setting and one for each thing.

    The place comes first: a reader knows where to look before reading what is there.
    """
    captions = [f"{PLACES[thing.cell]}: {phrase(thing)}" for thing in scene.things]
    return sorted([f"a picture of a {scene.type}", *captions])


def statements(scene: Scene, rng: Random, count: int) -> list[tuple[str, bool]]:
    """Write `count` pairs (sentence of a description, is it true?), half of them true on average.

    A false sentence differs from a true one in one respect: kind, colour, number, place or setting.
    """
    pairs = []
    for _ in range(count):
        is_true = rng.random() < 0.5
        field = rng.choice(("kind", "kind", "colour", "number", "cell", "type"))
        if field == "type":
            others = [setting for setting in SCENES if setting != scene.type]
            setting = scene.type if is_true else rng.choice(others)
            pairs.append((rng.choice(OPENINGS).format(setting), is_true))
            continue
        thing = rng.choice(scene.things)
        if not is_true:
            values = {"kind": scene.absent(), "colour": COLOURS, "number": NUMBERS,
                      "cell": range(9)}[field]
            values = [value for value in values if value != getattr(thing, field)]
            thing = replace(thing, **{field: rng.choice(values)})
        pairs.append((sentence(thing, rng.choice(SENTENCES)), is_true))
    return pairs
