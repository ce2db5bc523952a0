"""report.html: what a run did, for a person to look at; one file, without script or network.

Written from the files of the run's folder alone: config.json (settings), metrics.jsonl (curves),
results.json (measures and answers before and after), pairs.json (some training pairs, see
`save_pairs`) and samples.jsonl (some of PPO's sampled answers); what is missing is left out.
Everything that comes from data is escaped.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

import world
from benchmarks import MMHAL_KINDS, world_terms
from charts import dumbbell, lines
from data import Example, Response, Tokenizer
from files import read_json, write_atomic
from metrics import PER_KIND, bracket, paired, read_results, shown, unit
from readers import Pair
from rows import DataError, open_image

SCENES = 12  # of the gallery: the first ones of the test split, not chosen
PAIRS = 6
KINDS = {  # of false spans, as the legend explains them
    "object": "not in the picture", "attribute": "wrong colour", "position": "wrong place",
    "number": "wrong number", "other": "wrong setting",
}
ALGORITHMS = {
    "sft": "supervised fine-tuning on the given answers",
    "dpo": "direct preference optimisation (DPO)",
    "ddpo": "dense direct preference optimisation (DDPO) on corrected segments",
    "rm": "a reward model from ranked answers", "ppo": "reinforcement learning (PPO)",
    "vision": "pretraining of the vision tower", "base": "training of the built-in base model",
    "judge": "lessons in judging, for reward models to start from",
}
MEASURES = {  # section: (explanation, {measure: (label, 1 if more is better, -1 if less)})
    "Descriptions": ("Share of descriptions with at least one false …", {
        "hallucination/any": ("statement of any kind", -1), "hallucination/object": ("object", -1),
        "hallucination/attribute": ("colour", -1), "hallucination/position": ("position", -1),
        "hallucination/number": ("number", -1), "hallucination/other": ("setting", -1)}),
    "Objects": ("Object by object, in the same descriptions", {
        "chair_i": ("false among the objects mentioned (CHAIR)", -1),
        "coverage": ("mentioned among the objects there (coverage)", 1),
        "over_generalisation": ("extra false objects where habit expects them (Δ)", -1),
        "length": ("length of a description", 0)}),
    "Is there a …? (POPE)": ("Yes/no questions; absent objects are drawn …", {
        f"pope/{split}/{name}": (f"{split}: {label}", better)
        for split in ("random", "popular", "adversarial")
        for name, label, better in (("accuracy", "right", 1), ("f1", "F1 of yes", 1),
                                    ("yes_ratio", "answered yes", 0))}),
    "Other questions": ("Share answered right, by topic", {
        f"question/{topic}": (topic, 1)
        for topic in ("colour", "number", "place", "what", "comparison", "scene")}),
    "Eight kinds of question (MMHal)": ("Rated 0 to 6; below 3 is a hallucination", {
        "mmhal/hallucination": ("rated below 3", -1), "mmhal/score": ("mean rating", 1)}
        | {f"{PER_KIND}{kind}": (f"… {kind}", 1) for kind in MMHAL_KINDS}),
}
CURVES = (  # title, unit of the y axis, metrics drawn together
    ("Loss", "loss", ("loss",)),
    ("Implicit rewards", "β · log-ratio", ("rewards/chosen", "rewards/rejected")),
    ("Reward margin", "chosen − rejected", ("rewards/margins",)),
    ("Pairs ranked right", "share of the batch", ("rewards/accuracies",)),
    ("Response scores", "log-probability", ("logps/chosen", "logps/rejected")),
    ("Hallucinated answers", "share of the rollout", ("truth/hallucination",)),
    ("Reward", "per answer", ("objective/scores", "objective/rlhf_reward")),
    ("KL to the reference", "nats per answer", ("objective/kl",)),
    ("Length of answers", "tokens", ("response/length",)),
    ("Entropy", "nats per token", ("objective/entropy",)),
    ("Clipped", "share of the tokens", ("policy/clipfrac", "val/clipfrac")),
    ("Variance explained by the critic", "share", ("val/explained_variance",)),
    ("Kinds seen right", "share", ("accuracy/kind",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "per step", ("learning_rate",)),
)
STYLE = Path(__file__).with_name("report.css")


def write_report(run_folder: Path | str) -> Path:
    """Write report.html into a run's folder from the files there.

    Returns:
        Its path.

    Raises:
        FileNotFoundError, ValueError: a file that is there cannot be read, or config.json is not.
    """
    folder = Path(run_folder)
    config = read_json(folder / "config.json")
    settings, versions = config.get("settings", {}), config.get("versions", {})
    log, results, pairs = (folder / n for n in ("metrics.jsonl", "results.json", "pairs.json"))
    steps, samples = read_log(log), read_log(folder / "samples.jsonl")
    measured = read_results(results) if results.exists() else {}
    if any("scene" not in record for _, records in measured.values() for record in records):
        measured = {}  # of a reward model: agreement with rankings, not answers about scenes
    body = [
        f"<h1>{escape(folder.resolve().name)}</h1>",
        f"<p>{what_was_run(settings, steps)}</p>",
        tiles(measured), *with_links([
            ("What the model says", gallery(measured)), ("Measures", measures(measured)),
            ("Learning curves", curves(steps)), ("Sampled answers", sampled_answers(samples)),
            ("Training pairs", training_pairs(read_json(pairs)["pairs"]) if pairs.exists() else ""),
            ("Settings", setting_table(settings, versions)),
        ]),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(folder.resolve().name)} · plumbline</title>"
        f"<style>{STYLE.read_text()}</style></head>\n"
        f"<body>{chr(10).join(part for part in body if part)}</body></html>\n"
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def with_links(sections: list[tuple[str, str]]) -> list[str]:
    """The sections that have content, each under its title, and before them links to all."""
    anchor = lambda title: title.lower().replace(" ", "-")
    there = [(title, content, anchor(title)) for title, content in sections if content]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, _, anchor in there)
    return [f"<nav>{links}</nav>"] + [
        f'<section id="{anchor}"><h2>{title}</h2>{content}</section>'
        for title, content, anchor in there
    ]


def read_log(path: Path) -> list[dict]:
    """The lines of a log, if there is one; half a line at the end, of a killed run, is left out."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return [step for step in steps if isinstance(step, dict) and "step" in step]


def what_was_run(settings: dict, steps: list[dict]) -> str:
    algorithm = str(settings.get("algo", "run"))
    text = f"A run of {escape(ALGORITHMS.get(algorithm, algorithm))}"
    if steps:
        text += f", {steps[-1]['step']} steps"
    if settings.get("batch_size"):
        text += f" of {escape(str(settings['batch_size']))} rows"
    on_world = settings.get("data") in (None, ["world"])
    if algorithm in ("sft", "dpo", "ddpo") and on_world and settings.get("corrections"):
        count = escape(str(settings["corrections"]))
        text += f", on {count} corrections of the model's own answers"
    return text + ". A hallucination is a statement that the picture does not bear out."


def setting_table(settings: dict, versions: dict) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(str(k))}</code></td><td><code>{escape(str(v))}</code></td></tr>"
        for k, v in (settings | {f"version of {k}": v for k, v in versions.items()}).items()
    )
    return f"<details><summary>all of them</summary><table>{rows}</table></details>"


# ----------------------------------------------------------------------------------------- measures


def measures(measured: dict) -> str:
    """The table of all measures."""
    if "after" not in measured:
        return ""
    before, after = (measured.get(name, ({}, []))[0] for name in ("before", "after"))
    change = {}
    if before and [r["scene"] for r in measured["before"][1]] == [
        r["scene"] for r in measured["after"][1]
    ]:
        change = paired(*(world_terms(measured[name][1]) for name in ("before", "after")))
    scenes = len(measured["after"][1])
    head = ["", "before", "after", "change", "0 … 100 %"] if before else ["", "value"]
    cells = "".join(f'<th{" class=plot" if "…" in h else ""}>{h}</th>' for h in head)
    rows = [f"<tr>{cells}</tr>"]
    for section, (text, names) in MEASURES.items():
        known = {name: labels for name, labels in names.items() if name in after}
        if known:
            rows.append(f'<tr class="head"><th colspan="{len(head)}">{escape(section)} '
                        f"<small>{escape(text)}</small></th></tr>")
        for name, (label, better) in known.items():
            rows.append(measure_row(name, label, better, before, after, change))
    return (
        f"<p>On {scenes} held-out pictures, asked in words that training "
        "never used, answered greedily. Small print: 95 % intervals; those of the change are "
        "paired, so one that excludes 0 is more than chance.</p>"
        f'<p class="soft"><span class="key s1"></span>before<span class="key s0"></span>after</p>'
        f"<table>{''.join(rows)}</table>"
    )


def tiles(measured: dict) -> str:
    """The figures at the top."""
    wanted = {"hallucination/any": "of descriptions say something false",
              "hallucination/object": "of descriptions name an object that is not there",
              "coverage": "of the objects that are there get mentioned",
              "pope/adversarial/accuracy": "right on “is there a …?”, asked about what is expected"}
    before, after = (measured.get(name, ({}, []))[0] for name in ("before", "after"))
    cells = ""
    for name, label in wanted.items():
        if name in after:
            old = f"{shown(name, before[name]['value'])} → " if name in before else ""
            cells += (f'<div class="card tile"><b>{old}{shown(name, after[name]["value"])} %</b>'
                      f"{escape(label)}</div>")
    return f'<div class="grid tiles">{cells}</div>' if cells else ""


def measure_row(name: str, label: str, better: int, before: dict, after: dict, change: dict) -> str:
    """One measure: values with intervals, the paired change, and both drawn on a scale."""
    ending = {"%": " %", "words": " words", "of 6": ""}[unit(name)]
    value = lambda m: f"<td>{shown(name, m['value'])}{ending}<small>{bracket(name, m)}</small></td>"
    if not before:
        return f"<tr><td>{escape(label)}</td>{value(after[name])}</tr>"
    if name not in before:
        return f"<tr><td>{escape(label)}</td><td></td>{value(after[name])}<td></td><td></td></tr>"
    cell = "<td></td>"
    if name in change:
        found = change[name]
        sure = found["low"] > 0 or found["high"] < 0
        colour = "" if not sure or not better else (
            "good" if found["value"] * better > 0 else "bad")
        cell = (f'<td class="{colour}">{shown(name, found["value"], "+")}'
                f"<small>{bracket(name, found, '+')}</small></td>")
    plot = dumbbell(before[name], after[name]) if unit(name) == "%" else ""
    return (f"<tr><td>{escape(label)}</td>{value(before[name])}{value(after[name])}{cell}"
            f'<td class="plot">{plot}</td></tr>')


# ------------------------------------------------------------------------------------------- curves


def curves(steps: list[dict]) -> str:
    """A chart for every group of logged metrics that the run has."""
    charts = []
    for title, of, names in CURVES:
        series = {
            name: [(s["step"], s[name]) for s in steps if is_number(s.get(name))] for name in names
        }
        series = {name: points for name, points in series.items() if len(points) > 1}
        if series:
            charts.append(lines(title, of, series))
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------------------- pictures and answers


def sampled_answers(rows: list[dict]) -> str:
    """What PPO's policy said in its first and in its last rollout, and what that earned."""
    parts = []
    for step in dict.fromkeys((rows[0]["step"], rows[-1]["step"]) if rows else ()):
        cards = ""
        for row in (row for row in rows if row["step"] == step):
            cards += (
                f'<figure class="card"><h3>question</h3>{escape(row["question"])}'
                f'<h3>answer</h3>{escape(row["answer"])}<h3>score</h3>{row["score"]:.2f}, of it '
                f'{row["rm"]:.2f} from the reward model; KL {row["kl"]:.2f}; {row["tokens"]} tokens')
            if row["false"] is not None:
                cards += f'<h3>false in it</h3>{escape("; ".join(row["false"]) or "nothing")}'
            cards += "</figure>"
        parts.append(f'<h3>Step {step}</h3><div class="grid">{cards}</div>')
    return (f"<p>Some answers of the first and of the last rollout.</p>{''.join(parts)}"
            if parts else "")


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def marked(answer: str, spans: Iterable[dict]) -> str:
    """An answer as HTML, its false spans marked by kind."""
    out, at = "", 0
    for span in sorted(spans, key=lambda span: span["start"]):
        kind = span["kind"] if span["kind"] in KINDS else "other"
        out += escape(answer[at : span["start"]])
        out += (f'<mark class="{kind}" title="{KINDS[kind]}">'
                f'{escape(answer[span["start"] : span["end"]])}</mark>')
        at = span["end"]
    return out + escape(answer[at:])


def gallery(measured: dict) -> str:
    """The first held-out scenes with what was said about them."""
    records = {name: {r["scene"]: r for r in part[1]} for name, part in measured.items()}
    cards = []
    for number, record in list(records.get("after", {}).items())[:SCENES]:
        scene = world.make_scene(number, "test")
        truth = escape(world.describe(scene))
        if [thing.kind for thing in scene.things] != record["truth"]:
            picture = missing(f"scene {number} of another version of the world")
        else:
            picture = (f'<img src="{data_uri(world.draw(scene, 288))}" width="288" height="288" '
                       f'alt="{truth}"><details><summary>the truth</summary>{truth}</details>')
        said = ""
        for name, label in (("before", "before"), ("after", "after")):
            each = records.get(name, {}).get(number)
            if each:
                said += f"<h3>{label}</h3>{marked(each['answer'], each['spans'])}"
        cards.append(f'<figure class="card scene">{picture}<h3>question</h3>'
                     f'{escape(record["question"])}{said}</figure>')
    if not cards:
        return ""
    legend = "".join(f'<span><mark class="{kind}">{kind}</mark> {text}</span>'
                     for kind, text in KINDS.items())
    return (f"<p>The first {len(cards)} held-out pictures, enlarged, "
            f'not chosen. False statements are marked:</p><div class="legend">{legend}</div>'
            f'<div class="grid">{"".join(cards)}</div>')


def missing(name: str) -> str:
    return f'<div class="missing">no picture: {escape(name)}</div>'


# ----------------------------------------------------------------------------------- training pairs


def segments(response: Response, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """A response as (text, weight of its tokens), one entry for each run of equal weight."""
    found, text, start = [], "", 0
    for end in range(1, len(response.tokens) + 1):
        if end == len(response.tokens) or response.weight[end] != response.weight[start]:
            whole = tokenizer.decode(response.tokens[:end])  # so that no character is cut in two
            if whole != text:
                found.append((whole[len(text) :], response.weight[start]))
            text, start = whole, end
    return found


def save_pairs(
    folder: Path | str, pairs: Sequence[Pair], examples: Sequence[Example], tokenizer: Tokenizer
) -> None:
    """Write pairs.json: a few training pairs with their segments, for the report.

    Args:
        folder: of the run.
        pairs, examples: the training data, aligned by `name`; a few are taken at equal distances.
    """
    named = {pair.name: pair for pair in pairs}
    rows = []
    for example in examples[:: max(1, len(examples) // PAIRS)][:PAIRS]:
        pair = named[example.name]
        try:
            image = open_image(pair.name, pair.image)
            image.thumbnail((288, 288))
            uri = data_uri(image)
        except DataError:
            uri = None
        file = getattr(pair.image, "name", "") or pair.name
        rows.append({
            "image": uri, "file": file, "question": pair.question,
            "responses": [segments(response, tokenizer) for response in example.responses],
        })
    write_atomic(Path(folder) / "pairs.json", {"pairs": rows})


def training_pairs(rows: list[dict]) -> str:
    """The saved pairs as a diff: what was taken out, what was put in, its weight in the loss."""
    cards = []
    for row in rows:
        uri = str(row["image"] or "")
        whole = uri.startswith("data:image/webp;base64,")
        picture = f'<img src="{escape(uri)}" alt="">' if whole else missing(row["file"])
        texts = ""
        labels = (("corrected (chosen)", "ins"), ("the model's own (rejected)", "del"))
        for (label, tag), parts in reversed(list(zip(labels, row["responses"]))):
            diff = "".join(
                f"<{tag}>{escape(text)}</{tag}><sup>×{weight:g}</sup>" if weight > 1
                else escape(text) for text, weight in parts)
            texts += f"<h3>{label}</h3>{diff}"
        cards.append(f'<figure class="card pair">{picture}<h3>question</h3>'
                     f'{escape(row["question"])}{texts}</figure>')
    marks = any(weight > 1 for row in rows for parts in row["responses"] for _, weight in parts)
    explained = ("Corrected segments are marked; × is the weight of their tokens in the score of a "
                 "response (γ of Eq. 5), that of all others is 1." if marks else
                 "All tokens weigh the same in this run.")
    return (f'<p>{explained}</p><div class="grid">{"".join(cards)}</div>'
            if cards else "")
