"""report.html: a run on one page, in one file without scripts or network access.

The page is made from the files in the run's folder alone: config.json (what was run, settings),
metrics.jsonl (curves), results.json (measures and answers before and after), pairs.json (some
training pairs, see `save_pairs`) and samples.jsonl (some sampled completions). Sections without a
file are left out. All text from data is escaped.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

import world
from data import Example, segments
from evaluation.answers import whole_lines
from evaluation.benchmarks import MMHAL_KINDS
from evaluation.builtin import NEGATIVES, TOPICS, asked, world_terms
from evaluation.charts import curves, dumbbell
from evaluation.metrics import PER_KIND, colour, format_metric, paired, read_results, unit
from formats.files import read_json, understood, write_atomic
from formats.readers import Pair
from formats.rows import DataError, open_image
from formats.tokenizer import Tokenizer

SCENES = 12  # in the gallery: the first of the test split
PAIRS = 6
KINDS = {  # of false spans, as the legend explains them
    "object": "not in the picture", "attribute": "wrong colour", "position": "wrong place",
    "number": "wrong number", "other": "wrong setting",
}
MEASURES = {  # section: (explanation, {measure: label})
    "Descriptions": ("Share of descriptions with at least one false …", {
        "hallucination/any": "statement of any kind", "hallucination/object": "object",
        "hallucination/attribute": "colour", "hallucination/position": "position",
        "hallucination/number": "number", "hallucination/other": "setting"}),
    "Objects": ("Object by object, in the same descriptions", {
        "chair_i": "false among the objects mentioned (CHAIR)",
        "coverage": "mentioned among the objects there (coverage)",
        "over_generalisation": "extra false objects in their typical setting (Δ)",
        "length": "length of a description"}),
    "Is there a …? (POPE)": ("Yes/no questions; absent objects are chosen …", {
        f"pope/{split}/{name}": f"{split}: {label}" for split in NEGATIVES for name, label in (
            ("accuracy", "right"), ("f1", "F1 of yes"), ("yes_ratio", "answered yes"))}),
    "Other questions": ("Share answered right, by topic", {
        f"question/{topic}": topic for topic in TOPICS}),
    "Eight kinds of question (MMHal)": ("Rated 0 to 6; below 3 is a hallucination", {
        "mmhal/hallucination": "rated below 3", "mmhal/score": "mean rating"}
        | {f"{PER_KIND}{kind}": f"… {kind}" for kind in MMHAL_KINDS}),
}
TILES = {
    "hallucination/any": "of descriptions contain a false statement",
    "hallucination/object": "of descriptions mention an absent object",
    "coverage": "of the objects in the pictures are mentioned",
    "pope/adversarial/accuracy": "right on “is there a …?” about typical objects",
}
SAMPLED = {  # what is shown of a sampled completion, as far as its row has it
    "score": "{}", "rm": "{} of it from the reward model", "kl": "KL {}", "tokens": "{} tokens"}
PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def write_report(run_folder: Path | str) -> Path:
    """Write report.html into a run's folder, from the files there, and return its path.

    FileNotFoundError if there is no config.json, ValueError if a file cannot be read.
    """
    path = Path(run_folder) / "report.html"
    with understood(path.parent):
        page = report_page(path.parent)
    write_atomic(path, page)
    return path


def report_page(folder: Path) -> str:
    """Return the page."""
    config = read_json(folder / "config.json")
    results, pairs = folder / "results.json", folder / "pairs.json"
    steps, samples = (whole_lines(folder / f"{log}.jsonl") for log in ("metrics", "samples"))
    measured = read_results(results) if results.exists() else {}
    if any("scene" not in record for _, records in measured.values() for record in records):
        measured = {}  # of a reward model: agreement with rankings, no answers about scenes
    before, after = (measured.get(name, ({}, [])) for name in ("before", "after"))
    sections = {
        "Example descriptions": gallery(before[1], after[1]),
        "Measures": measures(before, after),
        "Blind baselines": blind_table(measured),
        "Learning curves": grid("", curves(steps)),
        "Sampled completions": sampled_completions(samples),
        "Training pairs": training_pairs(read_json(pairs)["pairs"]) if pairs.exists() else "",
        "Settings": setting_table(config),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in sections if sections[title]}
    return PAGE.substitute(
        name=escape(folder.resolve().name), summary=summary(config, steps),
        tiles=tiles(before[0], after[0]),
        links="".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items()),
        sections="\n".join(
            f'<section id="{anchor}"><h2>{title}</h2>{sections[title]}</section>'
            for title, anchor in anchors.items()))


def summary(config: dict, steps: list[dict]) -> str:
    """Describe the run in a sentence; config.json of older runs lacks "about" and "reads"."""
    settings, reads = config.get("settings", {}), config.get("reads")
    text = str(config.get("about") or f"A run of {settings.get('algo')}").rstrip(".")
    if steps:
        rows = f" of {settings['batch_size']} {reads or 'rows'}" if "batch_size" in settings else ""
        text += f": {steps[-1]['step']} steps{rows}"
    on_world = settings.get("data") in (None, ["world"]) and settings.get("corrections")
    corrected = on_world and settings.get("feedback", "corrections") == "corrections"
    if steps and corrected and reads in ("pairs", "conversations"):
        text += f", from {settings['corrections']} corrections of the model's own responses"
    return escape(f"{text}. A hallucination is a statement that the picture does not support.")


def setting_table(config: dict) -> str:
    versions = {f"version of {name}": value for name, value in config.get("versions", {}).items()}
    rows = "".join(
        f"<tr><td><code>{escape(str(k))}</code></td><td><code>{escape(str(v))}</code></td></tr>"
        for k, v in (config.get("settings", {}) | versions).items() if v is not None)
    return f"<details><summary>all settings</summary><table>{rows}</table></details>"


def grid(above: str, cards: Iterable[str]) -> str:
    """Return cards side by side below other HTML, or "" if there are no cards."""
    html = "".join(cards)
    return html and f'{above}<div class="grid">{html}</div>'


def card(top: str, texts: dict[str, str]) -> str:
    """Return a card with HTML by title, below a picture or ""."""
    body = "".join(f"<h3>{title}</h3>{text}" for title, text in texts.items())
    return f'<figure class="card">{top}{body}</figure>'


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def picture(uri: str | None, name: str) -> str:
    """Return a picture, or a note that it is missing."""
    if not uri:
        return f'<div class="missing">no picture: {escape(name)}</div>'
    return f'<img src="{escape(uri)}" alt="{escape(name)}"/>'


# ----------------------------------------------------------------------------------------- measures


def tiles(before: dict, after: dict) -> str:
    """Return the figures at the top."""
    value = lambda metrics, name: format_metric(name, metrics[name])[0]
    cells = ""
    for name, label in TILES.items():
        if name in after:
            old = f"{value(before, name)} → " if name in before else ""
            cells += f'<div class="card tile"><b>{old}{value(after, name)} %</b>{label}</div>'
    return cells and f'<div class="grid tiles">{cells}</div>'


def measures(before: tuple, after: tuple) -> str:
    """Return the table of all measures, from (metrics, records) before and after training."""
    (before, old_records), (after, records) = before, after
    if not after:
        return ""
    change = {}
    if before and asked(old_records) == asked(records):
        change = paired(world_terms(old_records), world_terms(records))
    key = '<p class="soft"><span class="key s1"></span>before<span class="key s0"></span>after</p>'
    head = ["", "before", "after", "change", "0 … 100 %"] if before else ["", "value"]
    rows = ["<tr>", *(f"<th>{title}</th>" for title in head), "</tr>"]
    for section, (text, labels) in MEASURES.items():
        known = [measure_row(name, label, before, after, change)
                 for name, label in labels.items() if name in after]
        if known:
            rows += [f'<tr class="head"><th colspan="{len(head)}">{section} <small>{text}</small>'
                     "</th></tr>", *known]
    return (
        f"<p>Greedy answers about {len(records)} held-out pictures, to questions in wordings that "
        "training never uses. Small print: 95 % intervals; those of the change are paired, so one "
        f"that excludes 0 is more than chance.</p>{key if before else ''}"
        f'<table class="{"changes" if before else "values"}">{"".join(rows)}</table>'
    )


def blind_table(measured: dict[str, tuple[dict, list[dict]]]) -> str:
    """Return the table of the edits that never look at the picture, beside before and after."""
    if len(measured) < 3:
        return ""
    text, labels = MEASURES["Descriptions"]
    labels = labels | {"coverage": MEASURES["Objects"][1]["coverage"]}
    rows = "".join(f"<th>{escape(name)}</th>" for name in ("", *measured))
    for name, label in labels.items():
        cells = (f"<td>{format_metric(name, found[name])[0]} %</td>"
                 for found, _ in measured.values())
        rows += f"</tr><tr><td>{label}</td>{''.join(cells)}"
    return (
        "<p>What the descriptions before training gain from edits that never look at the picture: "
        "without their last sentence, and without the sentences that a classifier of text calls "
        "false, as many as the coverage after training allows. Last, the descriptions after "
        f"training, scored against another picture of the same setting. {text}</p>"
        f'<table class="values"><tr>{rows}</tr></table>')


def measure_row(name: str, label: str, before: dict, after: dict, change: dict) -> str:
    """Return a table row: values with intervals, the paired change, and both on a scale."""
    ending = {"%": " %", "words": " words", "of 6": ""}[unit(name)]

    def shown(metrics: dict, ending: str = "", sign: str = "") -> str:
        if name not in metrics:
            return ""
        value, interval = format_metric(name, metrics[name], sign)
        return f"{value}{ending}<small>{interval}</small>"

    if not before:
        return f"<tr><td>{label}</td><td>{shown(after, ending)}</td></tr>"
    scale = dumbbell(before[name], after[name]) if name in before and unit(name) == "%" else ""
    return (f"<tr><td>{label}</td><td>{shown(before, ending)}</td><td>{shown(after, ending)}</td>"
            f'<td class="{colour(name, change.get(name))}">{shown(change, sign="+")}</td>'
            f'<td class="plot">{scale}</td></tr>')


# ---------------------------------------------------------------------------- pictures and answers


def sampled_completions(rows: list[dict]) -> str:
    """Return completions that the policy sampled in its first and its last rollout."""
    html = ""
    shown = lambda value: f"{value:.2f}" if isinstance(value, float) else escape(str(value))
    for step in dict.fromkeys(row["step"] for row in rows[:1] + rows[-1:]):
        cards = []
        for row in (row for row in rows if row["step"] == step):
            numbers = [text.format(shown(row[key])) for key, text in SAMPLED.items() if key in row]
            texts = {"question": escape(row["question"]), "completion": escape(row["answer"]),
                     "score": ", ".join(numbers)}
            if row.get("false") is not None:
                texts["false in it"] = escape("; ".join(row["false"]) or "nothing")
            cards.append(card("", texts))
        html += grid(f"<h3>Step {escape(str(step))}</h3>", cards)
    return html and f"<p>Some completions of the first and of the last rollout.</p>{html}"


def gallery(before: list[dict], after: list[dict]) -> str:
    """Return the first held-out scenes with their descriptions, from records."""
    cards, earlier = [], {record["scene"]: record for record in before}
    for record in after[:SCENES]:
        number, scene = record["scene"], world.make_scene(record["scene"], "test")
        shown = picture(None, f"scene {number} of another version of the world")
        if [thing.kind for thing in scene.things] == record["truth"]:
            truth = world.describe(scene)
            shown = picture(data_uri(world.draw(scene, 288)), truth)
            shown += f"<details><summary>the truth</summary>{escape(truth)}</details>"
        old = {"before": highlighted(earlier[number])} if number in earlier else {}
        cards.append(card(shown, {
            "question": escape(record["question"]), **old, "after": highlighted(record)}))
    legend = "".join(f'<span><mark class="{kind}">{kind}</mark> {text}</span>'
                     for kind, text in KINDS.items())
    return grid(f"<p>The first {len(cards)} held-out pictures, enlarged. False statements are "
                f'marked:</p><div class="legend">{legend}</div>', cards)


def highlighted(record: dict) -> str:
    """Return a record's description as HTML, its false spans marked by kind."""
    answer, html, at = record["answer"], "", 0
    for span in record["spans"]:
        start, end, kind = span["start"], span["end"], span["kind"]
        html += (f'{escape(answer[at:start])}<mark class="{kind}" title="{KINDS[kind]}">'
                 f"{escape(answer[start:end])}</mark>")
        at = end
    return html + escape(answer[at:])


# ----------------------------------------------------------------------------------- training pairs


def save_pairs(
    folder: Path | str, pairs: Iterable[Pair], examples: Sequence[Example], tokenizer: Tokenizer
) -> None:
    """Write pairs.json into a run's folder: PAIRS evenly spaced training pairs with segments.

    A pair and its example have the same index.
    """
    rows = []
    for pair, example in [*zip(pairs, examples)][:: max(1, len(examples) // PAIRS)][:PAIRS]:
        try:
            image = open_image(pair.name, pair.image)
            image.thumbnail((288, 288))
            uri = data_uri(image)
        except DataError:
            uri = None
        texts = [segments(response, tokenizer) for response in example.responses]
        rows.append({"image": uri, "file": pair.picture or pair.name, "question": pair.question,
                     "responses": texts})
    write_atomic(Path(folder) / "pairs.json", {"pairs": rows})


def training_pairs(rows: list[dict]) -> str:
    """Return the saved pairs as diffs, each corrected segment with its weight in the loss."""
    explained, cards = "All tokens weigh the same in this run.", []
    for row in rows:
        chosen, rejected = row["responses"]
        if any(weight > 1 for _, weight in chosen + rejected):
            explained = ("Corrected segments are marked; × is the weight of their tokens in the "
                         "score of a response (γ of Eq. 5); all others weigh 1.")
        cards.append(card(picture(row["image"], row["file"]), {
            "question": escape(row["question"]),
            "the model's own (rejected)": diff("del", rejected),
            "corrected (chosen)": diff("ins", chosen)}))
    return grid(f"<p>{explained}</p>", cards)


def diff(tag: str, parts: Iterable[tuple[str, float]]) -> str:
    """Return (text, weight) segments as HTML; the space before a corrected one is not marked."""
    html = ""
    for text, weight in parts:
        words = text.lstrip()
        html += escape(text[: len(text) - len(words)])
        corrected = f"<{tag}>{escape(words)}</{tag}><sup>×{weight:g}</sup>"
        html += corrected if text and weight > 1 else escape(words)
    return html
