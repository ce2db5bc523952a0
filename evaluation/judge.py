"""MMHal-Bench's questions, and the prompts that ask a judge to rate the answers.

The official prompt, with five worked examples, belongs to the benchmark's release. It is read from
the user's copy of eval_gpt4.py, which is parsed and never run. The published scores also depend on
the judge, gpt-4-0314; scores of another judge are comparable only with each other. `short` is this
project's own prompt without examples, which no published score uses.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.files import jsonl, write_atomic
from formats.rows import DataError

FIELDS = 4  # of a template: objects, question, human answer, answer to judge
SHORT = """\
You are an impartial judge. An assistant was shown an image and answered a question \
about it. You do not see the image; what is known about it is listed below. Judge how informative \
the answer is and whether it hallucinates, that is, whether it says anything about the image that \
is false or that the facts and the reference answer do not support. Analysis and general knowledge \
are welcome as long as they do not contradict the image.

Objects in the image: {}
Question: {}
Reference answer: {}
Answer to judge: {}

Explain your judgement briefly. Then end with one line "Rating: n", where n is
6  no hallucination, very informative, with good analysis
5  no hallucination, very informative
4  no hallucination, somewhat informative
3  no hallucination, not informative
2  hallucination, but very informative
1  hallucination, somewhat informative
0  hallucination, not informative
"""


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for the judge."""

    label: str  # "official" or "short"; every output names it
    template: str

    def fill(self, row: dict) -> str:
        """Return the prompt for a row of the filled template."""
        objects = ", ".join(row["image_content"])
        return self.template.format(
            objects, row["question"], row["gt_answer"], row["model_answer"])


def read_judge_prompt(name: str) -> JudgePrompt:
    """Return the prompt of a copy of the release's eval_gpt4.py, or the one named "short".

    Raises:
        DataError: the file does not have exactly one text with four places to fill.
    """
    if name == "short":
        return JudgePrompt("short", SHORT)
    try:
        tree = ast.parse(Path(name).read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"--judge_prompt {name}: no such file") from None
    except (SyntaxError, ValueError) as error:
        raise DataError(f"--judge_prompt {name}: not a Python file ({error})") from None
    texts = [node.value.value for node in tree.body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
             and isinstance(node.value.value, str) and node.value.value.count("{}") == FIELDS]
    try:
        [template] = texts
        template.format(*range(FIELDS))
    except (LookupError, ValueError):
        raise DataError(f"--judge_prompt {name}: has no template with {FIELDS} places {{}}; give "
                        "MMHal-Bench's eval_gpt4.py") from None
    return JudgePrompt("official", template)


def write_prompts(
    folder: Path, rows: Sequence[dict], answers: Sequence[str], prompt: JudgePrompt
) -> tuple[Path, Path]:
    """Write MMHal's filled template and the prompts for the judge; return their paths.

    The file names and the field "judge_prompt" of every row say which prompt it is.
    """
    filled = [{**row, "model_answer": text, "judge_prompt": prompt.label}
              for row, text in zip(rows, answers, strict=True)]
    paths = (folder / f"mmhal_{prompt.label}_filled.json",
             folder / f"mmhal_{prompt.label}_prompts.jsonl")
    write_atomic(paths[0], filled)
    write_atomic(paths[1], jsonl(
        {"id": i, "prompt": prompt.fill(row), "judge_prompt": prompt.label}
        for i, row in enumerate(filled)))
    return paths


def judge_note(label: str | None) -> str:
    """Return a note on what the judge's prompt means for its scores."""
    return {
        "official": "judge's prompt: official; published scores are those of gpt-4-0314",
        "short": "judge's prompt: short, this project's own; no published score uses it",
    }.get(label, "judge's prompt: unknown, the template was filled elsewhere")
