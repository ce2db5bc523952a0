"""What alignment costs: all benchmarks of a folder, on several models, in one table.

A model that says less hallucinates less, so the table also measures helpfulness (coverage, cover,
recall, VQA). The folder may have any of:

    pope/*.json[l]                POPE's questions: image, text, label
    chair/*.json                  COCO instances and captions, or {"image.jpg": ["object"]}
    chair/synonyms.txt            the official file, or --synonyms; else this project's own words
    chair/questions.jsonl         image and question; else all images of chair/*.json
    amber/                        AMBER's repository, or its folder data
    mmhal/response_template.json  MMHal's questions
    mmhal/eval_gpt4.py            the release's prompt for the judge; else the project's short one
    vqa/*.json[l]                 image, question, answers: short ones, scored as in VQAv2
    images/                       for all; or for one: pope/images/, amber/images/ ...

Every model has a folder in the output with its answers, which the same command resumes. MMHal needs
a judge: put its replies to mmhal_*_prompts.jsonl into mmhal_*_replies.jsonl there (* is the prompt,
official or short). suite.json and suite.html beside the folders have the table with intervals and
paired differences to the first model; both say how each benchmark was asked and scored.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from itertools import count
from pathlib import Path

from evaluation.benchmarks import rating, read_mmhal, read_replies
from evaluation.judge import JudgePrompt, read_judge_prompt, write_prompts
from evaluation.metrics import (
    Terms, colour, every_measure, format_metric, format_value, paired, titled,
)
from evaluation.parts import (
    Part, Rows, amber_parts, amber_responses, chair_part, mmhal_part, pope_part, vqa_part,
)
from formats.files import write_atomic
from formats.rows import DataError

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.25em .9em;text-align:right}
td{border-bottom:1px solid #8883}td:first-child,th[colspan]{text-align:left}
small{display:block;color:#888}th[colspan]{padding-top:1.5em}
.good{color:#18794e}.bad{color:#c62a2f}"""


def find_parts(
    folder: Path, images: str | None, suffix: str | None = None, synonyms: str | None = None,
    skip: list | None = None,
) -> tuple[list[Part], Callable[[Rows, Path], Rows] | None]:
    """Return the benchmarks of a folder, and `judged` for its MMHal if it has that.

    Raises:
        DataError, FileNotFoundError: there is none, or one lacks a file.
    """
    def where(name: str) -> str | None:
        own = [folder / name / "images", folder / "images"]
        return images or next((str(each) for each in own if each.is_dir()), None)

    files = lambda name: sorted([*(folder / name).glob("*.json"), *(folder / name).glob("*.jsonl")])
    parts = [pope_part(path, where("pope"), suffix, skip) for path in files("pope")]
    asked, words = folder / "chair" / "questions.jsonl", folder / "chair" / "synonyms.txt"
    synonyms = synonyms or (str(words) if words.exists() else None)
    if truth := sorted((folder / "chair").glob("*.json")):
        parts.append(chair_part(
            truth, where("chair"), [asked] if asked.exists() else [], None, synonyms, skip))
    if (folder / "amber").is_dir():
        parts += amber_parts(folder / "amber", where("amber"), suffix, skip)
    judge, template = None, folder / "mmhal" / "response_template.json"
    if template.exists():
        official = folder / "mmhal" / "eval_gpt4.py"
        prompt = read_judge_prompt(str(official) if official.exists() else "short")
        parts.append(mmhal_part(template, where("mmhal"), prompt.label))
        judge = partial(judged, template, prompt)
    parts += [vqa_part(path, where("vqa"), suffix, skip) for path in files("vqa")]
    if not parts:
        raise DataError(f"{folder}: no benchmark here; it may have pope/*.json, chair/*.json, "
                        "amber/, mmhal/response_template.json, vqa/*.json and images/")
    return parts, judge


def judged(template: Path, prompt: JudgePrompt, rows: Rows, folder: Path) -> Rows:
    """Write the judge's prompts for MMHal's answers; return the rows with its replies, if any.

    Replies to other prompts, or to unknown ones, are renamed and not scored.
    """
    prompts = folder / f"mmhal_{prompt.label}_prompts.jsonl"
    path = folder / f"mmhal_{prompt.label}_replies.jsonl"
    old = prompts.read_bytes() if prompts.exists() else None
    write_prompts(folder, read_mmhal(template), [row["answer"] for row in rows], prompt)
    if not path.exists():
        return []
    if old != prompts.read_bytes():
        names = (path.with_suffix(f".old{i}.jsonl") for i in count(1))  # replies are paid for
        path.rename(aside := next(each for each in names if not each.exists()))
        print(f"{aside}: replies to other answers or another prompt, not scored", file=sys.stderr)
        return []
    replies = read_replies(path, len(rows))
    if missing := [i for i, reply in enumerate(replies) if rating(reply) is None]:
        print(f"{path}: {len(missing)} replies without one rating count as 0 (to prompts "
              f"{', '.join(map(str, missing[:8]))})", file=sys.stderr)
    return [{**row, "reply": reply} for row, reply in zip(rows, replies)]


def measure(
    parts: Sequence[Part], answer: Callable[[Part, Path], Rows], folder: Path,
    judge: Callable[[Rows, Path], Rows] | None, answered: dict[str, list], seed: int,
) -> tuple[dict[str, dict], dict[str, dict[str, Terms]]]:
    """Answer and score all parts.

    Args:
        answer: part, file for the answers -> rows of one model.
        folder: of the model, for answers, AMBER's responses and MMHal's prompts.
        judge: see `find_parts`.
        answered: the first model's images and questions, by part; its own call fills them in.

    Returns:
        {part/measure: {"value", "low", "high"}}, and {part: the terms of its measures}.

    Raises:
        ValueError: the model answered other rows than the first one.
    """
    scores, terms, responses = {}, {}, []
    for part in parts:
        rows = answer(part, folder / f"{part.name.replace('/', '_')}.jsonl")
        these = [(row.get("image"), row["question"]) for row in rows]
        if answered.setdefault(part.name, these) != these:
            raise ValueError(f"{part.name}: {folder.name} answered other rows than the first model;"
                             " run again when all images can be read")
        rows = list(map(part.clean, rows))
        if part.name == "mmhal":
            rows = judge(rows, folder)
        if part.name.startswith("amber/"):
            responses += amber_responses(rows)
        if rows:
            found, terms[part.name] = part.measure(rows, seed)
            scores |= {f"{part.name}/{name}": each for name, each in found.items()}
    if responses:
        write_atomic(folder / "amber_responses.json", responses)
    return scores, terms


def notes(
    parts: Sequence[Part], args: Namespace, scores: dict[str, dict], answered: dict[str, list],
    totals: dict[str, int],
) -> dict[str, str]:
    """Return {part: how it was asked and scored, or why the first model has no scores}.

    Args:
        args: of evaluate.py.
        answered, totals: answered rows, and the number of all rows, by part.
    """
    found, first = {}, next(iter(scores.values()))
    for part in parts:
        found[part.name] = part.note(args, len(answered[part.name]), totals[part.name])
        if not any(name.startswith(f"{part.name}/") for name in first):
            found[part.name] += (
                "; no scores yet: give each model's mmhal_*_prompts.jsonl to a judge, put its "
                "replies in mmhal_*_replies.jsonl there, run again" if part.name == "mmhal"
                else "; no scores: no model answered a row")
    return found


# ------------------------------------------------------------------------------------------- tables


def compare(terms: dict[str, dict[str, dict[str, Terms]]], seed: int) -> dict[str, dict]:
    """Return {model: {part/measure: paired difference to the first model}} of the other models."""
    first, *others = terms
    return {
        name: {
            f"{part}/{measure}": change
            for part in terms[first] if part in terms[name]
            for measure, change in paired(terms[first][part], terms[name][part], seed).items()
        }
        for name in others
    }


def page(title: str, notes: dict[str, str], scores: dict[str, dict], differences: dict) -> str:
    """Return the table as HTML, a section for each part with its note."""
    first, *others = scores

    def cell(name: str, metric: dict | None, sign: str = "", style: str = "") -> str:
        if not metric:
            return "<td></td>"
        value, interval = format_metric(name, metric, sign)
        return f'<td class="{style}">{value}<small>{interval}</small></td>'

    heads = ["", first, 'always “No”'] + [t for n in others for t in (n, f"{n} − {first}")]
    rows = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    for part, note in notes.items():
        rows.append(f'<tr><th colspan="{len(heads)}">{escape(part)}<small>{escape(note)}</small>'
                    "</th></tr>")
        for name in (name for name in every_measure(scores) if name.startswith(f"{part}/")):
            own = scores[first].get(name, {})
            trivial = format_value(name, own["always_no"]) if "always_no" in own else ""
            shown = escape(titled(name)[len(part) + 1 :])
            row = f"<td>{shown}</td>{cell(name, own)}<td>{trivial}</td>"
            for other in others:
                row += cell(name, scores[other].get(name))
                change = differences[other].get(name)
                row += cell(name, change, "+", colour(name, change))
            rows.append(f"<tr>{row}</tr>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)} · plumbline</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><p>Shares in per cent. Small print: 95 % bootstrap "
        "intervals over images. Differences are paired; a coloured one excludes 0.</p>"
        f"<table>{''.join(rows)}</table></body></html>\n"
    )


def write_suite(
    folder: Path, title: str, models: dict[str, str], notes: dict[str, str],
    scores: dict[str, dict], differences: dict[str, dict],
) -> tuple[Path, Path]:
    """Write suite.json and suite.html; return their paths."""
    write_atomic(folder / "suite.json", {
        "models": models, "notes": notes, "scores": scores, "differences": differences})
    write_atomic(folder / "suite.html", page(title, notes, scores, differences))
    return folder / "suite.json", folder / "suite.html"
