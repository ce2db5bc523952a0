"""Measure how truthful a model is, on the built-in world and on public benchmarks.

    python evaluate.py runs/ddpo                                     the built-in world, again
    python evaluate.py --compare runs/sft runs/dpo runs/ddpo         paired differences
    python evaluate.py --model DIR --image photo.jpg --prompt "..."  one answer, streamed
    python evaluate.py --model DIR --data rows.jsonl --images DIR    many answers, into a JSONL file
    python evaluate.py --model DIR --pope coco_pope_random.json --images DIR
    python evaluate.py --model DIR --chair instances.json captions.json --images DIR
    python evaluate.py --model DIR --amber AMBER --images DIR        descriptions, yes/no questions
    python evaluate.py --model DIR --vqa questions.jsonl --images DIR
    python evaluate.py --model DIR --mmhal response_template.json --judge_prompt eval_gpt4.py
    python evaluate.py --mmhal FILLED.json --replies replies.jsonl   score the replies of a judge
    python evaluate.py --suite DIR --models A B                      all of them, side by side

Every score is printed with how it was obtained; evaluation/ lists departures from public scripts.

On the built-in world the truth is known, so measures for which the papers rely on people or GPT-4
are exact. Scenes are held out, and training never uses the wordings of the questions.

    hallucination/*      descriptions with a false object, attribute, position, number, any
    chair_i              false mentions of objects among all mentions
    coverage             objects mentioned among objects present: guards against terse answers
    pope/*               yes/no questions; absent objects are random, popular or adversarial
    question/*           right answers by topic
    over_generalisation  RLHF-V's Table 2: how much more often a setting's most frequent objects
                         are hallucinated in that setting than anywhere
    mmhal/*              MMHal's eight kinds of question, on its scale of 0..6

Answers go to --output (by default the run's `answers`, or runs/suite); the same command resumes.
"""

import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

from config import check_early, number

# --------------------------------------------------------------------------------- the command line


def make_parser(**options) -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
        **options)
    add, count = parser.add_argument, number(int, 1)
    add("run", nargs="?", help="run (or model) folder to measure on the built-in world")
    add("--compare", nargs="+", metavar="RUN", help="measured runs; differences are to the first")
    add("--model", metavar="DIR", help="run or model folder that answers")
    add("--tower", metavar="DIR", help="CLIP of an original LLaVA model that does not include it")
    add("--image", metavar="FILE", help="a picture to ask about, with --prompt")
    add("--prompt", metavar="TEXT", help="the question; with --data, of rows that have none")
    add("--data", nargs="+", metavar="FILE", help="JSONL, JSON or parquet: image and question")
    add("--pope", nargs="+", metavar="FILE", help="POPE's questions: image, text, label")
    add("--chair", nargs="+", metavar="FILE", help='COCO annotations, or {"a.jpg": ["object"]}')
    add("--amber", metavar="DIR", help="a copy of AMBER's repository; --images has its images")
    add("--vqa", nargs="+", metavar="FILE", help="image, question, and people's short answers")
    add("--mmhal", metavar="FILE", help="MMHal's response_template.json, or filled")
    add("--suite", metavar="DIR", help="a folder of benchmarks; see above")
    add("--models", nargs="+", metavar="DIR", help="of --suite; differences are to the first")
    add("--images", metavar="DIR", help="folder of the images; default: that of the questions")
    add("--answers", metavar="FILE", help="score these (--pope, --chair, --vqa; --amber's own)")
    add("--suffix", metavar="TEXT", help="a line after each question of --pope and --vqa "
        "['Answer the question using a single word or phrase.'], and of --amber's yes/no questions "
        "['']; '' asks as the file does")
    add("--synonyms", metavar="FILE", help="for CHAIR: the official data/synonyms.txt")
    add("--judge_prompt", metavar="FILE", help="for --mmhal: the release's eval_gpt4.py; "
        "'short': this project's own prompt, which no published score uses")
    add("--replies", metavar="FILE", help="a judge's replies to MMHal's prompts")
    add("--best_of", type=count, metavar="N", help="sample N answers and take the one with the "
        "highest reward by --reward_model; with a run, what that gives on the built-in world")
    add("--reward_model", metavar="DIR", help="run of train.py --algo rm, for --best_of")
    add("--captions", metavar="FILE", help="image_to_caption.json, for one trained with facts")
    add("--output", metavar="DIR", help="folder for answers and scores")
    add("--scenes", type=count, metavar="N", help="of the built-in world [300]")
    add("--max_new_tokens", type=count, metavar="N", help="longest answer; default: by the task")
    add("--temperature", type=number(float, 0), metavar="T",
        help="0: greedy; default: 0, with --best_of 1")
    add("--batch_size", type=count, default=16, metavar="N", help="rows of files at a time [16]")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of sampling and intervals [0]")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of computation; auto: as stored, but float32 for float16 on a CPU")
    add("--skip_bad_rows", action="store_true", help="leave unusable rows out and list them")
    return parser


def choose_command(args: Namespace, parser: ArgumentParser) -> str:
    """Return the option that names the command; exit if there is not exactly one."""
    no_model = {"run": True, "compare": True, "mmhal": args.replies, "suite": args.models,
                "image": False, "data": False}
    no_model |= dict.fromkeys(("pope", "chair", "amber", "vqa"), args.answers)
    wanted = sorted(name for name in no_model if getattr(args, name))
    if wanted == ["chair", "data"]:
        wanted = ["chair"]  # --data holds its questions
    if len(wanted) != 1:
        parser.error("give one of: a run, --compare, --image, --data, --pope, --chair, --amber, "
                     "--vqa, --mmhal, --suite")
    if not args.model and not no_model[wanted[0]]:
        parser.error(f"--{wanted[0]} needs --model")
    if args.answers and (args.model or args.suite):
        parser.error("--answers are scored without --model; --output DIR names the scores' folder")
    if args.image and not args.prompt:
        parser.error("--image needs --prompt")
    if args.mmhal and not args.replies and not args.judge_prompt:
        parser.error("--mmhal needs --judge_prompt: the release's eval_gpt4.py, or short")
    return wanted[0]


if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:
    choose_command((cli := make_parser()).parse_args(), cli)
    check_early(
        cli, **dict.fromkeys(("amber", "suite", "images"), "folder"),
        **dict.fromkeys(("run", "compare", "model", "models", "tower", "reward_model"), "model"),
        **dict.fromkeys(("image", "data", "pope", "chair", "vqa", "mmhal", "answers", "synonyms",
                         "judge_prompt", "replies", "captions"), "files"))

import torch

import evaluation
import generation
from evaluation import benchmarks, best_of, builtin, judge, metrics, parts, suite
from evaluation.answers import ImageQuestion, answer_file, read_questions, that_fit
from evaluation.parts import LONG_TOKENS, Part
from formats.checkpoint import find_device, fingerprint
from formats.files import error_message, understood, write_atomic
from formats.opening import Loaded, model_folder, open_model
from formats.rows import find_files, open_image, report_skipped

# ----------------------------------------------------------------------- runs, and single questions


def load(args: Namespace, path: str) -> Loaded:
    """Load a model in the chosen dtype; on a CPU float16 becomes float32, which is faster."""
    device, auto = find_device(args.device), args.dtype == "auto"
    loaded = open_model(path, device, None if auto else getattr(torch, args.dtype), args.tower)
    if auto and device.type == "cpu" and loaded[0].head.weight.dtype == torch.float16:
        loaded[0].float()
    return loaded


def run_world(args: Namespace) -> None:
    """Measure a run's model on the built-in world; rewrite its results.json and report.html.

    With --best_of or --output these stay as they are, and another results.json is written.
    """
    if args.temperature and not args.best:
        raise ValueError("the built-in world is measured greedily; --temperature goes with "
                         "--best_of here")
    folder = model_folder(args.run)
    is_run = folder.name == "model" and (folder.parent / "config.json").exists()
    path = folder.parent / "results.json"
    results = evaluation.read_scenes(path) if is_run and path.exists() else {}
    before = results.get("before")
    measured = len(next(iter(results.values()))[1]) if results else None
    scenes = args.scenes or measured or builtin.SCENES
    if measured not in (None, scenes):
        raise ValueError(f"{path} has measures of {measured} scenes, which do not compare with "
                         f"--scenes {scenes}; leave --scenes out, or move the file away")
    if args.best or args.output:
        path = output_file(args, "results.json")
        before = results.get("after" if args.best else "before")
        results = {"before": before} if before else {}
    here = builtin.questionnaire(builtin.held_out(scenes), args.seed)
    if before and builtin.asked(before[1]) != builtin.asked(here):
        raise ValueError(f"{path}: the measures to compare with have another --seed; leave it out")
    after = evaluation.measure_world(*load(args, args.run), scenes, args.seed, args.best)
    print(evaluation.table(before and before[0], after[0]))
    if is_run or args.best or args.output:
        evaluation.write_results(path, results | {"after": after})
        page = "" if args.best or args.output else f" and {evaluation.write_report(folder.parent)}"
        print(f"wrote {path}{page}", file=sys.stderr)


def run_compare(args: Namespace) -> None:
    with understood(" and ".join(args.compare)):
        print(evaluation.compare_runs(args.compare, args.seed))


def run_image(args: Namespace) -> None:
    """Stream the answer to one question about one image."""
    image = open_image("--image", Path(args.image))
    generation.stream(*load(args, args.model), image, args.prompt,
                      args.max_new_tokens or LONG_TOKENS, args.temperature, args.seed)


# ------------------------------------------------------------------------------- files of questions


def output_file(args: Namespace, name: str) -> Path:
    """Return a file in --output, or else in a folder of the model's run; make the folder."""
    folder = args.output and Path(args.output)
    if not folder:
        model = model_folder(args.run or args.model)
        is_run = (model.parent / "config.json").exists()
        run = model.parent if is_run else Path("runs", *metrics.model_names([str(model)]))
        folder = run / (f"best_of_{args.best_of}" if args.best else "answers")
    folder.mkdir(parents=True, exist_ok=True)
    inputs = args.data, args.pope, args.chair, args.vqa, args.mmhal and [args.mmhal]
    for file in find_files([each for given in inputs for each in given or ()]):
        if (folder / name).exists() and file.samefile(folder / name):
            raise ValueError(f"{file}: the results would replace it; choose another --output")
    return folder / name


def answer(args: Namespace, loaded: Loaded, questions: list[ImageQuestion], path: Path,
           limit: int, whole: bool = False) -> list[dict]:
    """Answer questions into a JSONL file; return the answered rows.

    Args:
        limit: of new tokens, if --max_new_tokens is not given.
        whole: fail for a bad row even with --skip_bad_rows.
    """
    model, tokenizer, settings = loaded
    limit, skip = args.max_new_tokens or limit, None if whole else args.skipped
    how = f"max_new_tokens={limit} temperature={args.temperature} seed={args.seed}"
    if args.dtype != "auto":
        how += f" dtype={args.dtype}"
    best, samples = args.best, args.best_of or 1
    questions = list(that_fit(model, tokenizer, questions, skip))
    if best:
        how += f" {best.label}"
        questions = best.with_captions(questions, skip)
    steps = len(questions) / args.batch_size * limit
    compiled = generation.worth_compiling(model.head.weight.device, steps)

    def respond(images: list, asked: list[ImageQuestion], seed: int) -> list[str]:
        texts = [each.question for each in asked]
        found = generation.answers(model, tokenizer, settings, images, texts, limit,
                                   args.temperature, samples, seed, args.batch_size, None, compiled)
        return best.answers(asked, images, found) if best else found

    by = f"{fingerprint(model)} {how}"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = answer_file(respond, by, questions, path, args.batch_size, args.seed, skip)
    print(f"answers: {path}", file=sys.stderr)
    return [row for row in rows if "answer" in row]


def run_data(args: Namespace) -> None:
    """Answer every row of the files."""
    paths = find_files(args.data)
    metrics.refuse_twins(path.stem for path in paths)
    questions = [read_questions(path, args.images, args.prompt, args.skipped) for path in paths]
    loaded = load(args, args.model)
    for path, asked in zip(paths, questions):
        answer(args, loaded, asked, output_file(args, f"{path.stem}.jsonl"), LONG_TOKENS)


def run_benchmark(args: Namespace) -> None:
    """Print and write the scores of --model or of --answers on a benchmark."""
    chosen, scored = parts.chosen_parts(args), []
    metrics.refuse_twins(part.file for part in chosen)
    questions = [([], 0) if args.answers else parts.counted(part.ask, args.skipped)
                 for part in chosen]  # bad ones fail first
    loaded = None if args.answers else load(args, args.model)
    for part, (asked, total) in zip(chosen, questions):
        if args.answers:
            with understood(args.answers):
                given = partial(part.given, Path(args.answers))
                asked, total = parts.counted(given, args.skipped)
            rows = [row for row in asked if row["answer"] is not None]
        else:
            path = output_file(args, f"{part.file}.jsonl")
            rows = list(map(part.clean, answer(args, loaded, asked, path, part.tokens)))
        if rows:
            note = part.note(args, len(rows), total)
            print_scores(args, part, part.measure(rows, args.seed)[0], note)
        scored += rows
    if not scored:
        raise ValueError("nothing to score: there are no answers")
    if args.amber and args.model:
        write_atomic(output_file(args, "amber_responses.json"), parts.amber_responses(scored))


def run_mmhal(args: Namespace) -> None:
    """Fill MMHal's template and write the judge's prompts; or score its replies."""
    path = Path(args.mmhal)
    rows = benchmarks.read_mmhal(path)
    if args.replies:
        if not any(row.get("model_answer") for row in rows):
            raise ValueError(f"{path}: no row has a model_answer; give the filled template, "
                             "mmhal_*_filled.json")
        replies = benchmarks.read_replies(Path(args.replies), len(rows))
        for i, reply in enumerate(replies):
            if benchmarks.rating(reply) is None:
                print(f"prompt {i}: not one rating, counts as 0: {reply[-60:]!r}", file=sys.stderr)
        labels = {row.get("judge_prompt") for row in rows}
        part = parts.mmhal_part(path, args.images, labels.pop() if len(labels) == 1 else None)
        print_scores(args, part, evaluation.mmhal(replies, args.seed), part.scored)
        return
    prompt = judge.read_judge_prompt(args.judge_prompt)
    questions = benchmarks.mmhal_questions(path, rows, args.images or path.parent)
    path = output_file(args, "mmhal.jsonl")
    answered = answer(args, load(args, args.model), questions, path, LONG_TOKENS, whole=True)
    texts = [row["answer"] for row in answered]
    filled, prompts = judge.write_prompts(path.parent, rows, texts, prompt)
    print(f"{judge.judge_note(prompt.label)}\ngive {prompts} to a judge; with its replies as rows "
          '{"id": 0, "reply": "..."}:\n'
          f"  python evaluate.py --mmhal {filled} --replies replies.jsonl")


def run_suite(args: Namespace) -> None:
    """Run all benchmarks of a folder on all models; print and write the comparison."""
    source, out = Path(args.suite), Path(args.output or "runs/suite")
    models = metrics.model_names(args.models or [args.model])
    chosen, judged = suite.find_parts(
        source, args.images, args.suffix, args.synonyms, args.skipped)
    metrics.refuse_twins(part.name for part in chosen)
    asked = {part.name: parts.counted(part.ask, args.skipped) for part in chosen}  # bad ones fail
    scores, terms, answered = {}, {}, {}
    for name, path in models.items():
        loaded = load(args, path)

        def ask(part: Part, file: Path) -> list[dict]:
            return answer(args, loaded, asked[part.name][0], file, part.tokens,
                          whole=part.name == "mmhal")  # its prompts need all answers

        scores[name], terms[name] = suite.measure(
            chosen, ask, out / name, judged, answered, args.seed)
        loaded = None  # before the next one is loaded
    totals = {name: total for name, (_, total) in asked.items()}
    notes = suite.notes(chosen, args, scores, answered, totals)
    print(*(f"{name}: {note}" for name, note in notes.items()), sep="\n")
    differences = suite.compare(terms, args.seed)
    print(evaluation.comparison(scores, differences))
    for path in suite.write_suite(out, source.resolve().name, models, notes, scores, differences):
        print(f"wrote {path}", file=sys.stderr)


def print_scores(args: Namespace, part: Part, scores: dict, note: str) -> None:
    """Print scores, and write them beside the answers if there is a folder."""
    print(f"{part.file}: {note}\n{evaluation.comparison({'value': scores})}")
    if args.output or args.model:
        mode = f".{part.mode}" if part.mode else ""
        write_atomic(output_file(args, f"{part.file}{mode}.scores.json"), scores)


COMMANDS = {"run": run_world, "compare": run_compare, "image": run_image, "data": run_data,
            "mmhal": run_mmhal, "suite": run_suite,
            **dict.fromkeys(("pope", "chair", "amber", "vqa"), run_benchmark)}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(epilog=f"--suite. {suite.__doc__}")
    args = parser.parse_args(arguments)
    command = choose_command(args, parser)
    if fault := best_of.misuse(args):
        parser.error(fault)
    args.skipped = [] if args.skip_bad_rows else None
    if args.temperature is None:
        args.temperature = 1.0 if args.best_of else 0.0
    try:
        args.best = best_of.load(args) if args.best_of else None
        COMMANDS[command](args)
    except (ValueError, OSError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("error: the GPU has too little memory; try a smaller --batch_size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130
    report_skipped(args.skipped)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
