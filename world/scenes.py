"""Scenes: a setting with three to five things in it, each of a kind, colour, number and place.

Settings have typical kinds, and kinds have usual colours and cells, with exceptions. An annotator
can mistake these regularities for the truth, and so can a model trained on their texts.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random

COLOURS = {  # name: RGB
    "red": (225, 40, 40), "green": (45, 165, 60), "blue": (45, 95, 230),
    "yellow": (250, 210, 40), "white": (248, 248, 248), "purple": (160, 60, 205),
}
KINDS = {  # kind: its usual colour (each colour is usual for four kinds, so that none stands out)
    "car": "red", "bus": "yellow", "bicycle": "blue", "house": "red", "tree": "green",
    "dog": "white", "cat": "white", "duck": "yellow", "boat": "blue", "umbrella": "red",
    "ball": "purple", "kite": "purple", "cup": "blue", "pot": "blue", "apple": "red",
    "bottle": "green", "chair": "green", "clock": "white", "lamp": "yellow", "bed": "white",
    "book": "purple", "hat": "yellow", "flower": "purple", "tractor": "green",
}
USUAL_CELLS = {  # kind: its usual cell, different for the most popular kinds of a setting
    "car": 4, "bus": 3, "bicycle": 5, "house": 0, "tree": 2, "dog": 7, "cat": 8, "duck": 3,
    "boat": 3, "umbrella": 1, "ball": 4, "kite": 0, "cup": 3, "pot": 1, "apple": 4, "bottle": 5,
    "chair": 6, "clock": 2, "lamp": 1, "bed": 4, "book": 3, "hat": 5, "flower": 5, "tractor": 5,
}
SCENES = {  # setting: its typical kinds, each with a popularity weight
    "street": {"car": 6, "house": 6, "bus": 5, "tree": 5, "bicycle": 2, "lamp": 2, "dog": 1},
    "kitchen": {"cup": 6, "pot": 6, "bottle": 5, "apple": 5, "chair": 2, "clock": 2, "cat": 1},
    "beach": {"umbrella": 6, "boat": 6, "ball": 5, "hat": 5, "kite": 2, "bottle": 2, "dog": 1},
    "farm": {"tractor": 6, "house": 6, "duck": 5, "tree": 5, "apple": 2, "cat": 2, "dog": 1},
    "park": {"tree": 6, "flower": 6, "kite": 5, "duck": 5, "ball": 2, "bicycle": 2, "dog": 1},
    "bedroom": {"bed": 6, "lamp": 6, "book": 5, "clock": 5, "chair": 2, "hat": 2, "cat": 1},
}
PLACES = (  # the 3x3 grid, row by row; no phrase is the beginning of another
    "at the top left", "at the top centre", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom centre", "at the bottom right",
)
NUMBERS = {1: "one", 2: "two", 3: "three"}
TYPICAL = 0.85  # chance that a thing is drawn from the setting's typical kinds, not from all kinds
USUAL_CELL = 0.7  # chance that a thing stands in its usual cell, if that is still free
UNUSUAL_COLOUR = 0.3  # chance that a thing has another colour than its usual one
NUMBER_WEIGHTS = (65, 20, 15)  # of one, two, three
TEST_SHARE = 5  # one scene content in five belongs to the test split


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    number: int  # 1, 2 or 3
    cell: int  # 0..8, index into PLACES


@dataclass(frozen=True)
class Scene:
    seed: int | str
    type: str  # the setting, a key of SCENES
    things: tuple[Thing, ...]  # in reading order; each kind and each cell at most once

    def find(self, kind: str) -> Thing | None:
        """Return the thing of this kind, or None."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    def absent(self, kinds: Iterable[str] = KINDS) -> list[str]:
        """Return those of `kinds` that are not in the scene."""
        return [kind for kind in kinds if self.find(kind) is None]

    def free_cells(self) -> list[int]:
        """Return the cells that hold nothing."""
        return sorted(set(range(9)) - {thing.cell for thing in self.things})


def in_reading_order(things: Iterable[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda thing: thing.cell))


def weighted_choice(rng: Random, weights: Mapping[str, float]) -> str:
    """Draw a key with a probability proportional to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def place(kind: str, free: list[int], rng: Random) -> Thing:
    """Draw a thing of this kind, mostly in its usual colour and cell; take its cell from `free`."""
    usual = USUAL_CELLS[kind] in free and rng.random() < USUAL_CELL
    cell = USUAL_CELLS[kind] if usual else rng.choice(free)
    free.remove(cell)
    colour = KINDS[kind]
    if rng.random() < UNUSUAL_COLOUR:
        colour = rng.choice([other for other in COLOURS if other != colour])
    return Thing(kind, colour, rng.choices((1, 2, 3), NUMBER_WEIGHTS)[0], cell)


def make_scene(seed: int | str, split: str = "train") -> Scene:
    """Make the scene with this seed. No content occurs in both splits, whatever the seeds.

    The split is read off a hash of the content (not of the seed: two seeds may draw the same
    content), and scenes are redrawn until one belongs to the wanted split.

    Raises:
        ValueError: `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = Random(f"{split} scene {seed}")  # a str seed is hashed by sha512: the same everywhere
    while True:
        setting = rng.choice(list(SCENES))
        kinds: dict[str, None] = {}  # a dict, since its order is stable
        for _ in range(rng.randint(3, 5)):
            pool = SCENES[setting] if rng.random() < TYPICAL else dict.fromkeys(KINDS, 1)
            pool = {kind: weight for kind, weight in pool.items() if kind not in kinds}
            kinds[weighted_choice(rng, pool)] = None
        free = list(range(9))
        things = in_reading_order(place(kind, free, rng) for kind in kinds)
        is_test = zlib.crc32(repr((setting, things)).encode()) % TEST_SHARE == 0
        if is_test == (split == "test"):
            return Scene(seed, setting, things)


def lookalike(scene: Scene, rng: Random, difference: float, fewer: bool = False) -> Scene:
    """Change the kind, colour, number or cell of some things, or (`fewer`) leave them out.

    Args:
        difference: 0..1, the share of the things that change, and of the four attributes that
            change about each; at least one thing and one attribute change.

    Returns:
        A scene with the same seed, so that `describe` words both alike.
    """
    chosen = rng.sample(range(len(scene.things)), max(1, round(difference * len(scene.things))))
    if fewer:
        gone = chosen[: len(scene.things) - 1]
        return replace(scene, things=tuple(t for i, t in enumerate(scene.things) if i not in gone))
    for i in chosen:
        things = list(scene.things)
        others = {"kind": scene.absent(), "cell": scene.free_cells(),
                  "colour": list(COLOURS), "number": list(NUMBERS)}
        for field in rng.sample(list(others), max(1, round(difference * 4))):
            now = getattr(things[i], field)
            value = rng.choice([other for other in others[field] if other != now])
            things[i] = replace(things[i], **{field: value})
        scene = replace(scene, things=tuple(things))
    return scene


def exchanged(scene: Scene, rng: Random, difference: float, field: str) -> Scene:
    """Change only the kinds, or only the cells, of some things, partly by exchanging them.

    Args:
        difference: 0..1, the share of the things that change; at least one, or two if no cell is
            free.
        field: "kind" or "cell".
    """
    free = scene.free_cells() if field == "cell" else scene.absent()
    count = max(1 if free else 2, round(difference * len(scene.things)))
    chosen = rng.sample(range(len(scene.things)), count)
    old = new = [getattr(scene.things[i], field) for i in chosen]
    while any(before == after for before, after in zip(old, new)):
        more = min(len(free), rng.randint(len(old) == 1, len(old)))
        new = rng.sample(old + rng.sample(free, more), len(old))
    things = list(scene.things)
    for i, value in zip(chosen, new):
        things[i] = replace(things[i], **{field: value})
    return replace(scene, things=in_reading_order(things))


def extended(scene: Scene, rng: Random, difference: float) -> Scene:
    """Add things of other kinds, mostly in their usual colours and cells.

    Args:
        difference: 0..1, added things per thing in the scene; at least one is added.
    """
    free = scene.free_cells()
    count = min(len(free), max(1, round(difference * len(scene.things))))
    more = [place(kind, free, rng) for kind in rng.sample(scene.absent(), count)]
    return replace(scene, things=in_reading_order((*scene.things, *more)))


def repeated(scene: Scene, rng: Random) -> Scene:
    """Add one of the things a second time, in a free cell; the scene must have one."""
    again = replace(rng.choice(scene.things), cell=rng.choice(scene.free_cells()))
    return replace(scene, things=in_reading_order((*scene.things, again)))


def labels(scene: Scene) -> tuple[list[int], list[int], list[int], int]:
    """Return per-cell classes for pretraining the vision tower: (kinds, colours, numbers, setting).

    The three lists have nine entries: index into KINDS plus 1, into COLOURS plus 1, and the number;
    0 where the cell is empty. The last value is the setting's index into SCENES.
    """
    kinds, colours, numbers = [0] * 9, [0] * 9, [0] * 9
    for thing in scene.things:
        kinds[thing.cell] = 1 + list(KINDS).index(thing.kind)
        colours[thing.cell] = 1 + list(COLOURS).index(thing.colour)
        numbers[thing.cell] = thing.number
    return kinds, colours, numbers, list(SCENES).index(scene.type)
