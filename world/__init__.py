"""A small drawn world with exact truth, in which small models hallucinate as large ones do.

A *scene* is a setting (street, kitchen, ...) and three to five *things*, each a kind, a colour, a
number and one cell of a 3x3 grid. From a scene the world makes the picture, a true description, and
the description that a *noisy annotator* writes from habit: they add a thing that the setting
usually has in its usual place, report an unusual colour as the usual one, and count three as two.
Habits need a world with regularities, so settings have typical kinds, and kinds have usual colours
and places, with exceptions.

A model trained on the annotator's texts learns to see, and it learns the habits too: which object
to expect in a kitchen is far easier to learn than whether it is there. LLaVA came to hallucinate in
this way (it copied co-occurrence priors from its training texts), and the over-generalisation
measure of RLHF-V (arXiv 2312.00849, Table 2) detects it in large models.

    scenes        what exists, and scenes of it        oracle     false spans, corrections, rankings
    texts         descriptions, captions, annotator    vqa        questions and their answers
    drawing       pictures                             feedback   the papers' data sets, simulated
    pretraining   the world's own models               tasks      their training examples

The names below are the world itself, without models. Functions depend on their arguments alone:
random choices come from the scene's seed or from the `random.Random` that is passed in.
"""

from world.drawing import draw
from world.oracle import (
    NOUNS, PLACE, Span, careless, correct, hallucinations, mentions, merit, rank,
)
from world.scenes import (
    COLOURS, KINDS, NUMBERS, PLACES, SCENES, USUAL_CELLS, Scene, Thing, exchanged, extended,
    labels, lookalike, make_scene, repeated,
)
from world.texts import (
    DESCRIBE_PROMPTS_EVAL, DESCRIBE_PROMPTS_TRAIN, Rates, annotate, describe, facts, misreported,
    statements,
)
from world.vqa import (
    CONTENT, QUESTION_PROMPTS_EVAL, QUESTION_PROMPTS_TRAIN, TOPICS, Question, answer_is_right,
    exists_question, question, questions,
)

__all__ = [
    "COLOURS", "CONTENT", "DESCRIBE_PROMPTS_EVAL", "DESCRIBE_PROMPTS_TRAIN", "KINDS", "NOUNS",
    "NUMBERS", "PLACE", "PLACES", "QUESTION_PROMPTS_EVAL", "QUESTION_PROMPTS_TRAIN", "Question",
    "Rates", "SCENES", "Scene", "Span", "TOPICS", "Thing", "USUAL_CELLS", "annotate",
    "answer_is_right", "careless", "correct", "describe", "draw", "exchanged", "exists_question",
    "extended", "facts", "hallucinations", "labels", "lookalike", "make_scene", "mentions", "merit",
    "misreported", "question", "questions", "rank", "repeated", "statements",
]
