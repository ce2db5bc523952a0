"""How truthful a model is, measured on the built-in world and on the public benchmarks.

    python evaluate.py runs/ddpo                                     the built-in world, again
    python evaluate.py --compare runs/sft runs/dpo runs/ddpo         paired differences
    python evaluate.py --model DIR --image photo.jpg --prompt "..."  one answer, as it comes
    python evaluate.py --model DIR --data rows.jsonl --images DIR    many answers, into a JSONL file
    python evaluate.py --model DIR --pope coco_pope_random.json --images DIR
    python evaluate.py --model DIR --chair instances.json captions.json --images DIR
    python evaluate.py --model DIR --mmhal response_template.json --images DIR
    python evaluate.py --mmhal FILLED.json --replies replies.jsonl   a judge has answered

The built-in world knows the truth about its pictures, so what the papers had people or GPT-4 judge
is counted exactly, on held-out scenes and with wordings that training never used:

    hallucination/*      descriptions with a false object, attribute, position, number, any
    chair_i              false mentions of objects among all mentions
    coverage             objects mentioned among objects there: saying little is no way to truth
    pope/*               yes/no questions; absent objects are random, popular or adversarial
    question/*           right answers by topic
    over_generalisation  RLHF-V's Table 2: how much more often a setting's most frequent objects
                         are hallucinated in that setting than anywhere
    mmhal/*              MMHal's eight kinds of question, on its scale of 0..6

Answers go to --output (default: `answers` in the run's folder), where interrupted commands go on.
"""

import argparse
import json
import sys
from pathlib import Path

import coco
import world
from ask import Ask, answer_file, answers, image_features, read_asks, stream
from benchmarks import (
    chair, judge, judge_prompt, mmhal, pope, questionnaire, rating, read_mmhal, read_replies,
    world_metrics, world_terms,
)
from checkpoint import find_device, fingerprint, load_llava
from files import sentence, write_atomic
from metrics import comparison, listing, paired, read_results, table, write_results
from model import LLaVA
from rows import DataError, find_files, image_path, open_image, whole_rows
from vision import ImageSettings

__all__ = [  # what train.py, tests and other tools use, wherever it is made
    "answers", "chair", "image_features", "measure_world", "mmhal", "pope", "read_results", "table",
    "world_metrics", "write_results",
]
SCENES = 500
SHORT = 16  # tokens; enough for every true answer to a short question of the world
YES_OR_NO = 6  # tokens; enough to tell which
LONG = 128  # tokens; twice its longest true description
DESCRIBE = "Please describe this image in detail."  # where --chair is given no questions


def measure_world(
    model: LLaVA, tokenizer, settings: ImageSettings, scenes: int = SCENES, seed: int = 0,
    progress: bool = True,
) -> tuple[dict, list[dict]]:
    """Measure a model on held-out scenes, greedily and with wordings that training never uses.

    Args:
        scenes: how many; scene i is `world.make_scene(i, "test")`.
        seed: of the choice of questions, and of the bootstrap.
        progress: show progress bars, on a terminal.

    Returns:
        metrics, {name: {"value", "low", "high"}} (see `benchmarks.world_terms`); and one record per
        scene: its truth, the description with its false spans, all questions and answers.
    """
    label = lambda text: text if progress else None
    truth = [world.make_scene(i, "test") for i in range(scenes)]
    records = questionnaire(truth, seed)
    features = image_features(model, settings, [world.draw(s, settings.size) for s in truth])
    texts = answers(
        model, tokenizer, settings, features, [record["question"] for record in records], LONG,
        progress=label("describing"),
    )
    asked = [(i, item) for i, record in enumerate(records) for item in record["asked"].values()]
    short = [each for each in asked if each[1]["topic"] in ("exists", "comparison")]
    rest = [each for each in asked if each[1]["topic"] not in ("exists", "comparison")]
    for part, tokens in ((short, YES_OR_NO), (rest, SHORT)):
        replies = answers(
            model, tokenizer, settings, features[[i for i, _ in part]],
            [item["question"] for _, item in part], tokens, progress=label("asking"),
        )
        for (_, item), reply in zip(part, replies):
            item["answer"] = reply
    for scene, record, text in zip(truth, records, texts):
        judge(scene, record, text, [item["answer"] for item in record["asked"].values()])
    return world_metrics(records, seed), records


# ------------------------------------------------------------------------------- what is asked for


def model_folder(path: str) -> Path:
    """Where the model of a run is; or the folder itself, if it is a model's."""
    folder = Path(path)
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{folder}: an unfinished run; it has no model yet")
    return folder


def load(given, path: str):
    """(model, tokenizer, image settings) on the chosen device."""
    return load_llava(model_folder(path), find_device(given.device))


def measure_run(given) -> None:
    """Measure a run's model on the built-in world; rewrite its results.json and report.html."""
    folder = model_folder(given.run)
    is_run = folder.name == "model" and (folder.parent / "config.json").exists()
    path = folder.parent / "results.json" if is_run else None
    before = read_results(path).get("before") if path and path.exists() else None
    scenes = given.scenes or (len(before[1]) if before else SCENES)
    after = measure_world(*load(given, given.run), scenes, given.seed)
    print(table(before[0], after[0]) if before else listing(after[0]))
    if path:
        write_results(path, before, after)
        from report import write_report  # here: no other command needs what it imports

        print(f"wrote {path} and {write_report(folder.parent)}", file=sys.stderr)


def compare(given) -> None:
    """Print the runs' measures and their paired differences to the first run."""
    found, names = [], [Path(run).name for run in given.compare]
    for run in given.compare:
        path = Path(run) / "results.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; first run: python evaluate.py {run}")
        found.append(read_results(path)["after"])
    keys = [[(r["scene"], r["question"]) for r in records] for _, records in found]
    for run, key in zip(given.compare, keys):
        if key != keys[0]:
            raise ValueError(
                f"{run} and {given.compare[0]} were measured on different scenes; measure both "
                "again with the same --scenes and --seed"
            )
    terms = [world_terms(records) for _, records in found]
    differences = [paired(terms[0], each, given.seed) for each in terms[1:]]
    print(comparison(names, [metrics for metrics, _ in found], differences))


def chat(given) -> None:
    """Stream the answer to one question about one image."""
    if not Path(given.image).is_file():
        raise FileNotFoundError(f"--image {given.image}: no such file")
    image = open_image("--image", Path(given.image))
    stream(*load(given, given.model), image, given.prompt, given.max_new_tokens or 512,
           given.temperature, given.seed)


# ------------------------------------------------------------------------------- files of questions


def output_folder(given) -> Path:
    if given.output:
        return Path(given.output)
    folder = model_folder(given.model)
    return (folder.parent if folder.name == "model" else Path("runs") / folder.name) / "answers"


def ask_all(given, asks: list[Ask], stem: str, tokens: int) -> list[dict]:
    """Answer questions into <output>/<stem>.jsonl; rows without an answer are listed, left out."""
    model, tokenizer, settings = load(given, given.model)
    tokens = given.max_new_tokens or tokens
    how = f"max_new_tokens={tokens} temperature={given.temperature} seed={given.seed}"
    reply = lambda images, questions, seed: answers(
        model, tokenizer, settings, images, questions, tokens, given.temperature, seed=seed,
        batch_size=given.batch_size)
    path = output_folder(given) / f"{stem}.jsonl"
    rows = answer_file(reply, f"{fingerprint(model)} {how}", asks, path, given.batch_size,
                       given.seed, given.skipped)
    print(f"answers: {path}", file=sys.stderr)
    return [row for row in rows if "answer" in row]


def given_answers(path: str) -> list[dict]:
    """Rows of a file of answers made elsewhere, each with its text under "answer"."""
    rows = []
    for name, row in whole_rows(Path(path)):
        texts = [row[k] for k in ("answer", "caption", "text") if isinstance(row.get(k), str)]
        if not texts:
            raise DataError(f"{name}: no answer, caption or text")
        rows.append({**row, "answer": texts[0], "name": name})
    return rows


def ask_data(given) -> None:
    """Answer every row of the given files."""
    for path in find_files(given.data):
        ask_all(given, read_asks(path, given.images, given.prompt, given.skipped), path.stem, 512)


def run_pope(given) -> None:
    """POPE on each of the given files of questions."""
    for path in find_files(given.pope):
        if given.answers:
            questions = [row for _, row in whole_rows(path)]
            rows = given_answers(given.answers)
            if len(rows) != len(questions):
                raise DataError(
                    f"{given.answers}: {len(rows)} answers to {len(questions)} questions")
            rows = [{**q, "answer": row["answer"]} for q, row in zip(questions, rows)]
        else:
            asks = read_asks(path, given.images, skip=given.skipped)
            rows = ask_all(given, asks, path.stem, SHORT)
        if not all(row.get("label") in ("yes", "no") for row in rows):
            raise DataError(f"{path}: every row needs a label, yes or no")
        print(path.stem)
        show(given, path.stem, pope(
            [row["answer"] for row in rows], [row["label"] for row in rows],
            [row.get("image", i) for i, row in enumerate(rows)]))


def run_chair(given) -> None:
    """CHAIR and Object HalBench's measures of descriptions."""
    truth, files = coco.read_objects(find_files(given.chair))
    if given.answers:
        rows = given_answers(given.answers)
    elif given.data:
        asks = [ask for path in find_files(given.data)
                for ask in read_asks(path, given.images, given.prompt, given.skipped)]
        rows = ask_all(given, asks, "chair", 512)
    else:
        prompt = given.prompt or DESCRIBE
        asks = [Ask(f"{given.chair[0]} image {name}", image_path("--chair", name, given.images),
                    prompt, {"image": name, "question": prompt}) for name in files.values()]
        rows = ask_all(given, asks, "chair", 512)
    keys = [coco.image_key(row.get("image", row.get("image_id", ""))) for row in rows]
    for row, key in zip(rows, keys):
        if key not in truth:
            raise DataError(f"{row.get('name', '--chair')}: nothing is known about image {key!r}; "
                            "give annotations that include it")
    show(given, "chair", chair([row["answer"] for row in rows], [truth[key] for key in keys], keys))


def run_mmhal(given) -> None:
    """Fill MMHal's template and write the judge's prompts; or read its replies."""
    path = Path(given.mmhal)
    rows = read_mmhal(path)
    if given.replies:
        replies = read_replies(Path(given.replies), len(rows))
        for i, reply in enumerate(replies):
            if rating(reply) is None:
                what = "no reply" if not reply else "not exactly one rating"
                print(f"prompt {i}: {what}, counts as 0: {reply[-60:]!r}", file=sys.stderr)
        show(given, "mmhal", mmhal(replies))
        return
    asks = [
        Ask(f"{path} row {i}", mmhal_image(f"{path} row {i}", row, given.images), row["question"],
            {"image": row["image_id"], "question": row["question"]})
        for i, row in enumerate(rows, 1)
    ]
    given.skipped = None  # 96 prompts in a fixed order: none can be left out
    for row, answered in zip(rows, ask_all(given, asks, "mmhal", 512)):
        row["model_answer"] = answered["answer"]
    folder = output_folder(given)
    write_atomic(folder / "mmhal_filled.json", rows)
    prompts = [{"id": i, "prompt": judge_prompt(row)} for i, row in enumerate(rows)]
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
    write_atomic(folder / "mmhal_prompts.jsonl", "".join(lines))
    print(f'give {folder / "mmhal_prompts.jsonl"} to a judge; with its replies as rows '
          f'{{"id": 0, "reply": "..."}}:\n  python evaluate.py --mmhal '
          f'{folder / "mmhal_filled.json"} --replies replies.jsonl')


def mmhal_image(name: str, row: dict, images: str | None) -> Path:
    """The file of a row's image: named as in its address, or by its id."""
    names = [str(row["image_src"]).rpartition("/")[2]]
    names += [f"{row['image_id']}.{kind}" for kind in ("jpg", "jpeg", "png")]
    there = [each for each in names if each and (Path(images or ".") / each).is_file()]
    return image_path(name, (there or names)[0], images)


def show(given, stem: str, metrics: dict) -> None:
    """Print metrics; keep them beside the answers, where there is such a place."""
    print(listing(metrics))
    if given.output or given.model:
        path = output_folder(given) / f"{stem}.scores.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, metrics)


# --------------------------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = cli.add_argument
    add("run", nargs="?", help="run (or model) folder to measure on the built-in world")
    add("--compare", nargs="+", metavar="RUN", help="measured runs; differences are to the first")
    add("--model", metavar="DIR", help="run or model folder that answers")
    add("--image", metavar="FILE", help="a picture to ask about, with --prompt")
    add("--prompt", metavar="TEXT", help="the question; with --data, of rows that have none")
    add("--data", nargs="+", metavar="FILE", help="JSONL, JSON or parquet: image and question")
    add("--pope", nargs="+", metavar="FILE", help="POPE's questions: image, text, label")
    add("--chair", nargs="+", metavar="FILE",
        help='COCO instances and captions, or {"image.jpg": ["object"]}')
    add("--mmhal", metavar="FILE", help="MMHal's response_template.json, or filled")
    add("--images", metavar="DIR", help="folder that image names are relative to")
    add("--answers", metavar="FILE", help="score these answers (for --pope, --chair); ask no model")
    add("--replies", metavar="FILE", help="a judge's replies to MMHal's prompts")
    add("--output", metavar="DIR", help="folder for answers and scores")
    add("--scenes", type=int, metavar="N", help=f"of the built-in world [{SCENES}]")
    add("--max_new_tokens", type=int, metavar="N", help="longest answer; the default fits the task")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0: greedy [0]")
    add("--batch_size", type=int, default=16, metavar="N", help="questions at a time [16]")
    add("--seed", type=int, default=0, metavar="N", help="of sampling and intervals [0]")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    add("--skip_bad_rows", action="store_true", help="list unusable rows and go on")
    return cli


def choose(given, cli: argparse.ArgumentParser):
    """The command that the options ask for; anything unclear ends here."""
    commands = {"run": measure_run, "compare": compare, "image": chat, "pope": run_pope,
                "chair": run_chair, "mmhal": run_mmhal, "data": ask_data}
    wanted = [name for name in commands if getattr(given, name)]
    if "chair" in wanted and "data" in wanted:
        wanted.remove("data")  # the questions of --chair
    if len(wanted) != 1:
        cli.error("give one of: a run, --compare, --image, --data, --pope, --chair, --mmhal")
    scores_only = given.answers or given.replies
    if wanted[0] not in ("run", "compare") and not given.model and not scores_only:
        cli.error(f"--{wanted[0]} needs --model")
    if given.image and not given.prompt:
        cli.error("--image needs --prompt")
    return commands[wanted[0]]


def main(arguments: list[str] | None = None) -> int:
    cli = parser()
    given = cli.parse_args(arguments)
    command = choose(given, cli)
    given.skipped = [] if given.skip_bad_rows else None
    try:
        command(given)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    if given.skipped:
        print(f"{len(given.skipped)} rows left out:", *given.skipped, sep="\n  ", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
