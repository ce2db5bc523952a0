"""The page on which people correct a model's answers (RLHF-V, section 3.1).

    python annotate.py --world                              try it on the built-in world
    python annotate.py answers.jsonl --images photos/       evaluate.py's answers, or any JSONL with
                                                            image, question and answer
    python annotate.py answers.jsonl --images photos/ --adjudicate
    python annotate.py --agreement answers.corrections.jsonl

Corrections go into answers.corrections.jsonl, which `train.py --algo ddpo --data` reads. If several
people annotate, each adds ?annotator=NAME to the address and gets the answers in another order.
"""

import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from config import check_early

# --------------------------------------------------------------------------------- the command line


def parser() -> ArgumentParser:
    cli = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = cli.add_argument
    add("answers", nargs="?", type=Path, help="rows of image, question and answer")
    add("--images", metavar="DIR", help="folder that image names are relative to")
    add("--model", metavar="DIR", help="run or model folder whose tokens decide what was changed")
    add("--tower", metavar="DIR", help="CLIP of an original LLaVA --model that does not include it")
    add("--out", type=Path, metavar="FILE", help="default: beside the answers, *.corrections.jsonl")
    add("--world", action="store_true", help="answers of the built-in base about drawn pictures")
    add("--overlap", type=float, default=0.0, metavar="SHARE",
        help="share of the answers that two annotators correct, independently [0]")
    add("--adjudicate", action="store_true", help="decide on answers with different corrections")
    add("--agreement", type=Path, metavar="FILE", help="print how far the annotators agree")
    add("--host", default="127.0.0.1", help="other machines need the token in the address")
    add("--port", type=int, default=8000, metavar="N", help="0: any free one [8000]")
    return cli


def parse(arguments: list[str] | None) -> Namespace:
    """Parse the command line; exit if its options are not compatible."""
    cli = parser()
    given = cli.parse_args(arguments)
    if sum(map(bool, (given.answers, given.world, given.agreement))) != 1:
        cli.error("give one of: a file of answers, --world, --agreement FILE")
    if not 0 <= given.overlap <= 1 or not 0 <= given.port < 2**16:
        cli.error("--overlap is a share from 0 to 1, --port a number below 65536")
    if given.tower and not given.model:
        cli.error("--tower needs --model")
    return given


if __name__ == "__main__":
    parse(None)
    check_early(parser(), answers="files", agreement="files", images="folder", model="model",
                tower="model")

import secrets
import socket
from random import Random

import world
from annotation.agreement import agreement
from annotation.diff import Units
from annotation.server import LOOPBACK, Server
from annotation.store import Store, read_answers
from formats.checkpoint import fingerprint, load_llava
from formats.files import error_message, jsonl, write_atomic
from formats.opening import open_model
from generation import answers

WORLD = Path("runs/annotate")  # where --world works
BASE = Path(__file__).parent / "world" / "base"
SCENES = 20
SIDE = 288  # pixels; the base sees every picture at a quarter of this


def make_world() -> Path:
    """Draw scenes and have the shipped base describe them, unless the files exist.

    Returns:
        answers.jsonl, as evaluate.py writes it; the pictures are in `images` beside it.
    """
    path, images = WORLD / "answers.jsonl", WORLD / "images"
    if path.exists():
        return path
    print(f"drawing {SCENES} pictures and having the base describe them", file=sys.stderr)
    images.mkdir(parents=True, exist_ok=True)
    pictures = [world.draw(world.make_scene(f"annotate {i}"), SIDE) for i in range(SCENES)]
    questions = [Random(i).choice(world.DESCRIBE_PROMPTS_TRAIN) for i in range(SCENES)]
    model, tokenizer, settings = load_llava(BASE)
    texts = answers(model.float(), tokenizer, settings, pictures, questions)
    rows = [{"image": f"{i:03}.png", "question": question, "answer": text, "by": fingerprint(model)}
            for i, (question, text) in enumerate(zip(questions, texts))]
    for row, picture in zip(rows, pictures):
        picture.save(images / row["image"])
    write_atomic(path, jsonl(rows))
    return path


def read_units(model: str | Path | None, tower: str | None) -> Units:
    """Return the tokens of a run's or model's folder, or words."""
    return Units() if model is None else Units(open_model(model, tower=tower)[1])


def open_server(given: Namespace) -> Server:
    """Read the answers, lock the file of corrections, and bind the port."""
    if given.world:
        given.answers, given.images = make_world(), WORLD / "images"
        given.model = given.model or BASE
    found, empty = read_answers(given.answers, given.images)
    if empty:
        print(f"{given.answers}: {empty} rows without an answer left out", file=sys.stderr)
    units = read_units(given.model, given.tower)
    out = given.out or given.answers.with_suffix(".corrections.jsonl")
    store = Store(found, out, given.overlap, given.adjudicate)
    if not store.answers:
        raise ValueError(f"{out}: no answer has two different corrections to decide between")
    token = "" if given.host in LOOPBACK else secrets.token_urlsafe(16)
    try:
        return Server(given.host, given.port, store, units, token)
    except OSError as error:
        raise ValueError(f"{given.host}:{given.port}: {error.strerror}; choose another --host or "
                         "--port") from None


def serve(given: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    with open_server(given) as server:
        host = socket.gethostname() if given.host in ("0.0.0.0", "::") else given.host
        host = f"[{host}]" if ":" in host else host
        path, units = server.store.path, server.units
        hint = "" if units.tokenizer else " (--model DIR compares by its tokens)"
        print(f"{len(server.store.answers)} answers, compared by {units.name}{hint}",
              f"corrections: {path}", f"open http://{host}:{server.server_port}/"
              + f"{server.token}/" * bool(server.token), sep="\n", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            options = {"data": path, "images": given.images or given.answers.parent}
            options |= {} if given.world else {"model": given.model, "tower": given.tower}
            words = " ".join(f"--{name} {shlex.quote(str(value))}"
                             for name, value in options.items() if value)
            after = f"; next: python train.py --algo ddpo {words}"
            written = path.exists() and path.stat().st_size
            print(f"\nall corrections are saved{after if written else ''}")


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        if given.agreement:
            print(agreement(given.agreement, read_units(given.model, given.tower)))
        else:
            serve(given)
    except (ValueError, OSError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
