"""What alignment costs: all benchmarks of a folder, on several models, in one table.

A model that says less hallucinates less, so helpfulness is measured beside hallucination (coverage,
cover, recall, VQA). The folder may have any of:

    pope/*.json[l]                POPE's questions: image, text, label
    chair/*.json                  COCO instances and captions, or {"image.jpg": ["object"]}
    chair/synonyms.txt            the official file of words (else this project's own)
    chair/questions.jsonl         image and question; else all images of chair/*.json
    amber/                        AMBER's repository, or its folder data
    mmhal/response_template.json  MMHal's questions
    mmhal/eval_gpt4.py            the release's prompt for the judge; else the project's short one
    vqa/*.json[l]                 image, question, answers: short ones, scored as in VQAv2
    images/                       of all; or of one: pope/images/, amber/images/ ...

Every model has a folder in the output with its answers, which the same command resumes. MMHal waits
there for a judge: its replies to mmhal_*_prompts.jsonl go to mmhal_replies.jsonl. suite.json and
suite.html beside the folders have the table with intervals and paired differences to the first
model; both say how each benchmark was asked and scored.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from evaluation.benchmarks import read_mmhal, read_replies
from evaluation.judge import JudgePrompt, read_judge_prompt, write_prompts
from evaluation.metrics import (
    INTERVAL, PER_KIND, Terms, aligned, format_metric, format_value, paired, titled,
)
from evaluation.parts import (
    Part, Rows, amber_parts, amber_responses, chair_part, mmhal_part, pope_part, vqa_part,
)
from formats.files import write_atomic
from formats.rows import DataError

LESS_IS_BETTER = ("chair", "chair_s", "chair_i", "response", "mention", "hal", "cog",
                  "hallucination")
NEITHER = ("yes_ratio",)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.25em .9em;text-align:right}
td{border-bottom:1px solid #8883}td:first-child,th[colspan]{text-align:left}
small{display:block;color:#888}th[colspan]{padding-top:1.5em}
.good{color:#18794e}.bad{color:#c62a2f}"""


def find_parts(
    folder: Path, images: str | None, suffix: str | None = None, skip: list | None = None
) -> tuple[list[Part], JudgePrompt | None]:
    """Return the benchmarks of a folder, and the judge's prompt if MMHal is one of them.

    Raises:
        DataError, FileNotFoundError: there is none, or one lacks a file.
    """
    def where(name: str) -> str | None:
        own = [folder / name / "images", folder / "images"]
        return images or next((str(each) for each in own if each.is_dir()), None)

    files = lambda name: sorted([*(folder / name).glob("*.json"), *(folder / name).glob("*.jsonl")])
    parts = [pope_part(path, where("pope"), suffix, skip) for path in files("pope")]
    asked, words = folder / "chair" / "questions.jsonl", folder / "chair" / "synonyms.txt"
    if truth := sorted((folder / "chair").glob("*.json")):
        parts.append(chair_part(
            truth, where("chair"), [asked] if asked.exists() else [], None,
            str(words) if words.exists() else None, skip))
    if (folder / "amber").is_dir():
        parts += amber_parts(folder / "amber", where("amber"), suffix, skip)
    prompt, template = None, folder / "mmhal" / "response_template.json"
    if template.exists():
        official = folder / "mmhal" / "eval_gpt4.py"
        prompt = read_judge_prompt(str(official) if official.exists() else "short")
        parts.append(mmhal_part(template, where("mmhal"), prompt.label))
    parts += [vqa_part(path, where("vqa"), suffix, skip) for path in files("vqa")]
    if not parts:
        raise DataError(f"{folder}: no benchmark here; it may have pope/*.json, chair/*.json, "
                        "amber/, mmhal/response_template.json, vqa/*.json and images/")
    return parts, prompt


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Return {name: path}: the folder's own name, or the whole path where two share it.

    Raises:
        ValueError: a path comes twice.
    """
    if len(set(paths)) < len(paths):
        raise ValueError("--models: every model once")
    last = [[part for part in Path(path).parts if part != "model"][-1:] for path in paths]
    return {
        name[0] if name and last.count(name) == 1 else path.strip("/").replace("/", "_"): path
        for name, path in zip(last, paths)
    }


def judged(folder: Path, template: Path, rows: Rows, prompt: JudgePrompt) -> Rows:
    """Write the judge's prompts for MMHal's answers; return the rows with its replies, if any."""
    write_prompts(folder, read_mmhal(template), [row["answer"] for row in rows], prompt)
    path = folder / "mmhal_replies.jsonl"
    if not path.exists():
        return []
    return [{**row, "reply": reply} for row, reply in zip(rows, read_replies(path, len(rows)))]


def measure(
    parts: Sequence[Part], answer: Callable[[Part], Rows], folder: Path, template: Path,
    prompt: JudgePrompt | None, seed: int = 0,
) -> tuple[dict[str, dict], dict[str, dict[str, Terms]]]:
    """Answer and score all parts.

    Args:
        answer: part -> cleaned rows of one model.
        folder: of the model, for AMBER's responses and MMHal's prompts.
        template, prompt: of MMHal.

    Returns:
        {part/measure: {"value", "low", "high"}}, and {part: the terms of its measures}.
    """
    scores, terms, responses = {}, {}, []
    for part in parts:
        rows = answer(part)
        if part.name == "mmhal":
            rows = judged(folder, template, rows, prompt)
        if part.name.startswith("amber/"):
            responses += amber_responses(rows)
        if rows:
            found, terms[part.name] = part.measure(rows, seed)
            scores |= {f"{part.name}/{name}": each for name, each in found.items()}
    if responses:
        write_atomic(folder / "amber_responses.json", responses)
    return scores, terms


def notes(
    parts: Sequence[Part], tokens: dict[str, int], scores: dict[str, dict]
) -> dict[str, str]:
    """Return {part: how it was asked and scored, or why it has no scores}."""
    found = {}
    for part in parts:
        found[part.name] = part.note(tokens[part.name])
        if not any(each.startswith(f"{part.name}/") for own in scores.values() for each in own):
            found[part.name] += ("; no scores yet: give each model's mmhal_*_prompts.jsonl to a "
                                 "judge, put its replies in mmhal_replies.jsonl there, run again")
    return found


# ------------------------------------------------------------------------------------------- tables


def compare(terms: dict[str, dict[str, dict[str, Terms]]], seed: int = 0) -> dict[str, dict]:
    """Return {model: {part/measure: paired difference to the first model}} of the other models."""
    first, *others = terms
    return {
        name: {
            f"{part}/{measure}": change
            for part in terms[first].keys() & terms[name].keys()
            for measure, change in paired(terms[first][part], terms[name][part], seed).items()
        }
        for name in others
    }


def table(scores: dict[str, dict], differences: dict[str, dict]) -> str:
    """Format all models as text: values, the first one's intervals, and paired differences.

    Args:
        scores: {model: {measure: {"value", "low", "high"}}}.
        differences: {model: the same, to the first model}.
    """
    first, *others = scores
    trivial = any("always_no" in each for each in scores[first].values())
    head, rows = [first, INTERVAL] + ['always "No"'] * trivial, {}
    for name in others:
        head += [name, f"- {first}, {INTERVAL}"]
    for measure, own in scores[first].items():
        if measure.startswith(PER_KIND):
            continue
        row = rows[measure] = list(format_metric(measure, own))
        if trivial:
            row.append(format_value(measure, own["always_no"]) if "always_no" in own else "")
        for name in others:
            other, change = scores[name].get(measure), differences[name].get(measure)
            row.append(format_value(measure, other["value"]) if other else "")
            row.append(" ".join(format_metric(measure, change, "+")) if other and change else "")
    return aligned(head, rows)


def colour(measure: str, change: dict) -> str:
    """Return "good" or "bad" where a difference is more than chance, else nothing."""
    last = measure.rpartition("/")[2]
    if last in NEITHER or change["low"] <= 0 <= change["high"]:
        return ""
    return "good" if (change["value"] < 0) == (last in LESS_IS_BETTER) else "bad"


def page(title: str, notes: dict[str, str], scores: dict[str, dict], differences: dict) -> str:
    """Return the same table as HTML, a section for each part with its note."""
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
        for name in (name for name in scores[first] if name.startswith(f"{part}/")):
            own = scores[first][name]
            trivial = format_value(name, own["always_no"]) if "always_no" in own else ""
            shown = escape(titled(name)[len(part) + 1 :])
            row = f"<td>{shown}</td>{cell(name, own)}<td>{trivial}</td>"
            for other in others:
                row += cell(name, scores[other].get(name))
                change = differences[other].get(name)
                row += cell(name, change, "+", colour(name, change) if change else "")
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
