"""Preference data from one format to another.

    python data.py convert RLHF-V-Dataset/*.parquet rows.jsonl      the images go to rows_images/
    python data.py convert human_preference.json rows.jsonl --images coco/train2017
    python data.py convert rows.jsonl rows.parquet --images DIR     as RLHF-V-Dataset has it

Whatever `readers.read_pairs` reads can be converted; the ending of the output chooses its format.
Images that are files already stay where they are when JSON lines are written, which go on naming
them relative to --images. The output is whole or absent, and nothing that exists is overwritten.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from files import sentence, sync, whole_folder, write_atomic
from readers import Pair, read_pairs
from rows import FORMATS, DataError, image_content, skipping

GROUP = 100  # rows per row group of a parquet file: with photos, some tens of megabytes
ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


def convert(
    patterns: Sequence[str | Path], out: Path, images: str | Path | None = None,
    skip: list[str] | None = None,
) -> int:
    """Write the preference pairs of files as JSON lines or as RLHF-V's parquet.

    Args:
        patterns: files or glob patterns, in any format of `readers.read_pairs`.
        out: ends in .jsonl or .parquet.
        images: folder that image names are relative to; None: the folder of each file.
        skip: if given, messages about bad rows are collected here instead of raised.

    Returns:
        The number of rows written.

    Raises:
        DataError: a row is wrong, or the format asked for cannot express it.
        ValueError: the output exists, has another ending, or has no folder to go to.
    """
    write = {".jsonl": write_jsonl, ".parquet": write_parquet}.get(out.suffix)
    if write is None:
        raise ValueError(f"{out}: the output should end in .jsonl or .parquet")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder")
    for path in (out, image_folder(out)):
        if path.exists():
            raise ValueError(f"{path} exists; delete it first, or choose another name")
    return write(read_pairs(patterns, images, skip), out, images, skip)


def image_folder(out: Path) -> Path:
    """Where the images go that JSON lines cannot hold."""
    return out.with_name(f"{out.stem}_images")


def write_jsonl(pairs: list[Pair], out: Path, images, skip: list[str] | None) -> int:
    """Rows of image, question, chosen, rejected, and history where there was one."""
    embedded = [not isinstance(pair.image, Path) for pair in pairs]
    if any(embedded) and not all(embedded):
        raise ValueError("some images are files and some inside parquet; convert these one by one")
    folder, lines, taken = image_folder(out), [], {}
    with whole_folder(folder) if any(embedded) else contextlib.nullcontext() as making:
        for pair in pairs:
            with skipping(skip):
                if making:
                    content = image_content(pair.name, pair.image)
                    image = safe_name(pair, content, taken)
                    (making / image).write_bytes(content)
                    image = f"{folder.name}/{image}"  # readers look beside the lines by default
                else:
                    image = relative_name(pair, Path(images or out.parent))
                history = {"history": pair.history} if pair.history else {}
                row = {"image": image, **history, "question": pair.question,
                       "chosen": pair.chosen, "rejected": pair.rejected}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if not lines:
            raise DataError("no usable row is left")
    write_atomic(out, "".join(lines))
    return len(lines)


def relative_name(pair: Pair, folder: Path) -> str:
    if not pair.image.is_relative_to(folder.resolve()):
        raise DataError(f"{pair.name}: image {pair.image} lies outside {folder}; name the folder "
                        "of all images by --images")
    return pair.image.relative_to(folder.resolve()).as_posix()


def safe_name(pair: Pair, content: bytes, taken: dict[str, bytes]) -> str:
    """A file name for an embedded image: what the data set calls it, without folders, signs, lies.

    Args:
        taken: hashes of the images that have names already, by name; one image keeps one name.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            ending = ENDINGS[image.format]
    except Exception:  # a broken file leads decoders anywhere
        raise DataError(f"{pair.name}: the image is no JPEG, PNG or WebP file") from None
    digest = hashlib.sha256(content).hexdigest()
    called = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(getattr(pair.image, "name", "")).stem)
    for i in itertools.count(1):
        name = (called.strip("_")[:80] or digest[:16]) + (f"-{i}" if i > 1 else "") + ending
        if taken.setdefault(name.lower(), digest) == digest:
            return name


def write_parquet(pairs: list[Pair], out: Path, images, skip: list[str] | None) -> int:
    """RLHF-V-Dataset's columns; what we do not know about a row's origin is left empty."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{out}: writing parquet needs pyarrow; pip install pyarrow") from None
    columns = {
        "ds_name": arrow.string(),
        "image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}),
        "text": arrow.string(), "origin_dataset": arrow.string(), "origin_split": arrow.string(),
        "idx": arrow.int64(), "image_path": arrow.string(),
    }
    schema, written = arrow.schema(columns), 0
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with parquet.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(pairs), GROUP):
                rows = []
                for pair in pairs[start : start + GROUP]:
                    with skipping(skip):
                        rows.append({"idx": written + len(rows), **parquet_fields(pair, out.stem)})
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                written += len(rows)
        if not written:
            raise DataError("no usable row is left")
        sync(temporary)
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def parquet_fields(pair: Pair, data_set: str) -> dict:
    if pair.history:
        raise DataError(f"{pair.name}: has earlier turns, for which RLHF-V's format has no place; "
                        "convert to .jsonl")
    content = image_content(pair.name, pair.image)
    content = content.read_bytes() if isinstance(content, Path) else content
    name = getattr(pair.image, "name", "")
    texts = {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    return {"ds_name": data_set, "image": {"bytes": content, "path": name}, "image_path": name,
            "text": json.dumps(texts, ensure_ascii=False), "origin_dataset": "",
            "origin_split": "{}"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python data.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("convert",))
    parser.add_argument("data", nargs="+", metavar="IN", help="files, in any preference format")
    parser.add_argument("out", type=Path, metavar="OUT", help="ends in .jsonl or .parquet")
    parser.add_argument("--images", metavar="DIR", help="folder that image names are relative to")
    parser.add_argument("--skip_bad_rows", action="store_true", help="list unusable rows and go on")
    given = parser.parse_args(arguments)
    skipped: list[str] | None = [] if given.skip_bad_rows else None
    try:
        count = convert(given.data, given.out, given.images, skipped)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    if skipped:
        print(f"{len(skipped)} rows left out:", *skipped, sep="\n  ", file=sys.stderr)
    print(f"{given.out}: {count} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
