"""Questions about a scene with their true answers, and whether a given answer agrees."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from world.oracle import NOUNS, VALUES, any_of
from world.scenes import COLOURS, KINDS, NUMBERS, PLACES, SCENES, Scene, Thing, weighted_choice
from world.texts import be, capital, noun, phrase, plural, with_article

Prompts = Mapping[str, tuple[str, ...]]  # topic: wordings of the question

QUESTION_PROMPTS_TRAIN: Prompts = {
    "exists": ("Is there {a_kind}?", "Can you see {a_kind}?", "Is there {a_kind} in this picture?",
               "Tell me, is there {a_kind}?", "Look at the picture. Is there {a_kind} in it?"),
    "colour": ("What colour {be} the {noun}?", "Tell me the colour of the {noun}.",
               "What colour {be} the {noun} in this picture?", "What is the {noun}'s colour?",
               "Can you tell me what colour the {noun} {be}?"),
    "number": ("How many {kinds} are there?", "How many {kinds} can you see?",
               "How many {kinds} are there in this picture?", "Tell me how many {kinds} you see.",
               "Can you tell me how many {kinds} there are?"),
    "place": ("Where {be} the {noun}?", "Where can you see the {noun}?",
              "Where {be} the {noun} in this picture?",
              "Where in this picture can you see the {noun}?",
              "Can you tell me where the {noun} {be}?"),
    "scene": ("What place is this?", "What place can you see in the picture?",
              "Tell me what place you see.", "What place is this a picture of?",
              "Can you tell me what place this is?"),
    "comparison": ("{Be} the {noun} {relation} the {other}?",
                   "In this picture, {be} the {noun} {relation} the {other}?",
                   "Tell me, {be} the {noun} {relation} the {other}?"),
    "more": ("Are there more {kinds} than {others}?",
             "Tell me, are there more {kinds} than {others}?",
             "Can you see if there are more {kinds} than {others}?"),
    "what": ("What is {place}?", "What can you see {place}?", "Tell me what you see {place}.",
             "What is there in this picture {place}?", "Can you tell me what is {place}?"),
}
QUESTION_PROMPTS_EVAL: Prompts = {
    "exists": ("Can you see {a_kind} in the picture?", "Is there {a_kind} in the picture?"),
    "colour": ("What is the colour of the {noun}?", "Tell me what colour the {noun} {be}."),
    "number": ("How many {kinds} are in the picture?", "Tell me how many {kinds} there are."),
    "place": ("Where in the picture {be} the {noun}?", "Tell me where the {noun} {be}."),
    "scene": ("What place is in the picture?", "Tell me what place this is."),
    "comparison": ("In the picture, {be} the {noun} {relation} the {other}?",),
    "more": ("Can you see more {kinds} than {others}?",),
    "what": ("What is there {place}?", "Tell me what is {place}."),
}
TOPICS = {  # topic: how often `questions` asks about it
    "exists": 8, "colour": 3, "number": 3, "place": 3, "scene": 1, "comparison": 3, "what": 3,
}
RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "to the left of": lambda a, b: a.cell % 3 < b.cell % 3,
    "to the right of": lambda a, b: a.cell % 3 > b.cell % 3,
    "above": lambda a, b: a.cell // 3 < b.cell // 3,
    "below": lambda a, b: a.cell // 3 > b.cell // 3,
    "more": lambda a, b: a.number > b.number,
}
CONTENT = {  # topic: the words of an answer that count
    "exists": "^yes|^no", "comparison": "^yes|^no", "colour": any_of(COLOURS),
    "number": any_of(VALUES), "place": any_of(PLACES), "scene": any_of(SCENES),
    "what": "|".join((any_of(VALUES), any_of(COLOURS), any_of(NOUNS), "nothing")),
}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    topic: str  # a key of TOPICS


def exists_question(scene: Scene, kind: str, rng: Random, held_out: bool = False) -> Question:
    """Ask whether there is a `kind`: the question of the POPE benchmark, with its true answer."""
    prompts = QUESTION_PROMPTS_EVAL if held_out else QUESTION_PROMPTS_TRAIN
    text = rng.choice(prompts["exists"]).format(a_kind=with_article(kind))
    thing = scene.find(kind)
    return Question(text, f"Yes, {PLACES[thing.cell]}." if thing else "No.", "exists")


def question(scene: Scene, topic: str, rng: Random, held_out: bool = False) -> Question:
    """Ask about `topic`, a key of TOPICS; `held_out` takes the wordings that training never uses.

    Yes and no are equally likely to be right. Absent kinds come half from all kinds, half from the
    setting's typical ones, where habit says yes.
    """
    prompts = QUESTION_PROMPTS_EVAL if held_out else QUESTION_PROMPTS_TRAIN
    thing = rng.choice(scene.things)
    if topic == "exists":
        kind = thing.kind
        if rng.random() < 0.5:
            kind = rng.choice(scene.absent(KINDS if rng.random() < 0.5 else SCENES[scene.type]))
        return exists_question(scene, kind, rng, held_out)
    if topic == "comparison":
        return comparison_question(scene, rng, prompts)
    cell = thing.cell
    if topic == "what" and rng.random() < 0.3:
        cell = rng.choice(scene.free_cells())
    answer = {
        "colour": thing.colour, "number": NUMBERS[thing.number], "place": PLACES[cell],
        "scene": with_article(scene.type),
        "what": phrase(thing) if cell == thing.cell else "nothing",
    }[topic]
    text = rng.choice(prompts[topic]).format(
        be=be(thing), noun=noun(thing), place=PLACES[cell], kinds=plural(thing.kind))
    return Question(text, capital(answer) + ".", topic)


def comparison_question(scene: Scene, rng: Random, prompts: Prompts) -> Question:
    """Compare two things in place or number; yes and no are equally likely for each relation."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a != b]
    relation = rng.choice([name for name, holds in RELATIONS.items()
                           if any(holds(a, b) for a, b in pairs)])  # then (b, a) is a no
    wanted = rng.random() < 0.5
    a, b = rng.choice([pair for pair in pairs if RELATIONS[relation](*pair) == wanted])
    text = rng.choice(prompts[relation if relation == "more" else "comparison"]).format(
        Be=capital(be(a)), be=be(a), noun=noun(a), other=noun(b), relation=relation,
        kinds=plural(a.kind), others=plural(b.kind))
    return Question(text, "Yes." if wanted else "No.", "comparison")


def questions(scene: Scene, rng: Random, count: int, held_out: bool = False) -> list[Question]:
    """Ask `count` different questions (about 30 make sense), topics in TOPICS' proportions.

    Raises:
        ValueError: there are not so many about the scene.
    """
    asked: dict[str, Question] = {}
    repeated = 0
    while len(asked) < count:
        new = question(scene, weighted_choice(rng, TOPICS), rng, held_out)
        repeated = repeated + 1 if new.text in asked else 0
        if repeated > 1000:
            raise ValueError(f"a scene has about {len(asked)} different questions, not {count}")
        asked.setdefault(new.text, new)
    return list(asked.values())


def answer_is_right(question: Question, answer: str) -> bool:
    """Return whether the first sentence of an answer states what the true answer states.

    Only the words that matter to the topic count, so "It is red" is right where "Red." is.
    """
    content = re.compile(rf"\b(?:{CONTENT[question.topic]})\b", re.I)

    def content_words(text: str) -> list[str | int]:
        words = map(str.lower, content.findall(re.split(r"[.!?\n]", text.strip())[0]))
        return [NOUNS.get(word, VALUES.get(word, word)) for word in words]

    return content_words(answer) == content_words(question.answer)
