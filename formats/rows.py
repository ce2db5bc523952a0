"""From files to rows and pictures: JSON lines, JSON arrays, parquet, and the images they name.

The content of a file decides which of these it is, never its name. Images stay on disk until they
are opened: a row holds a file name or a place in a parquet file, so data sets of any size fit in
memory. `readers.py` interprets the rows.
"""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path

from PIL import Image, ImageOps

from vision import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders that ever open a user's file


class DataError(ValueError):
    """A fault in a user's file; the message names the file, the row and the remedy."""


@contextlib.contextmanager
def skipping(skip: list[str] | None) -> Iterator[None]:
    """Collect the block's DataError in `skip`, or let it pass if that is None."""
    try:
        yield
    except DataError as error:
        if skip is None:
            raise
        skip.append(str(error))


def report_skipped(skip: list[str] | None) -> None:
    """Print to stderr how many rows were left out, and why; at most 20 reasons."""
    if skip:
        more = [f"and {len(skip) - 20} more"] if len(skip) > 20 else []
        print(f"{len(skip)} rows left out:", *skip[:20], *more, sep="\n  ", file=sys.stderr)


# -------------------------------------------------------------------------------- from file to rows


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """Return the files of names and glob patterns, those of one pattern in alphabetical order."""
    paths = []
    for pattern in patterns:
        whole = Path(pattern).exists()  # it may contain [brackets]
        found = [pattern] if whole else sorted(glob(str(pattern), recursive=True))
        if not found:
            raise DataError(f"{pattern}: no such file")
        for path in map(Path, found):
            if path.is_dir():
                raise DataError(f"{path}: a folder; name its files, for example '{path}/*.parquet'")
            paths.append(path)
    return paths


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Return (name, row) of each row of a parquet file, a JSON array or JSON lines.

    A name is file and row number, counted from 1. A row that cannot be read comes as a DataError in
    its place; a file that is broken as a whole raises one.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1") or path.suffix == ".parquet":
        return read_parquet(path)
    is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return read_array(path) if is_array else read_jsonl(path)


def whole_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield what `read_rows` does, but raise the DataError of a row that cannot be read."""
    for name, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        yield name, row


def read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                name = f"{path} row {number}"
                try:
                    yield name, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # of the JSON or of its encoding
                    yield name, DataError(f"{name}: not valid JSON ({error})")


def read_array(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the file complete?") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def open_parquet(path: Path):
    """Return a pyarrow ParquetFile; DataError if pyarrow or the file's end is missing."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has many
        raise DataError(f"{path}: not a complete parquet file ({error})") from None


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """Yield rows, one row group in memory at a time, without the bytes of their images."""
    table, number = open_parquet(path), 0
    fields = {f.name: str(f.type) for f in table.schema_arrow}
    embedded = fields.get("image", "").startswith(("struct", "binary", "large_binary"))
    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    columns = [leaf for leaf in leaves if not (embedded and leaf in ("image", "image.bytes"))]
    for group in range(table.num_row_groups):
        try:
            rows = table.read_row_group(group, columns).to_pylist()
            rows = rows or [{} for _ in range(table.metadata.row_group(group).num_rows)]
        except Exception as error:
            raise DataError(f"{path}: row group {group + 1} cannot be read ({error})") from None
        for i, row in enumerate(rows):
            number += 1
            name = f"{path} row {number}"
            if embedded:
                file_name = (row.get("image") or {}).get("path") or row.get("image_path") or ""
                row["image"] = ParquetImage(path, group, i, str(file_name))
            if str(row.get("text", "")).startswith("{"):  # RLHF-V: question and answers as JSON
                try:
                    row |= json.loads(row["text"])
                except (ValueError, RecursionError) as error:
                    row = DataError(f"{name}: text is not valid JSON ({error})")
            yield name, row


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file, read on demand."""

    file: Path
    group: int  # row group
    row: int  # within the group
    name: str  # file name in the data set; may be empty

    def read(self) -> bytes | None:
        column = image_column(self.file, self.file.stat().st_mtime_ns, self.group)
        cell = column[self.row].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell


Source = Path | ParquetImage  # where an image is


@lru_cache(maxsize=1)
def image_column(file: Path, changed: int, group: int):
    """Return the images of one row group. The last group stays in memory: rows come in order."""
    return open_parquet(file).read_row_group(group, ["image"]).column("image")


def image_path(name: str, image: str, images: str | Path | None) -> Path:
    """Return the file of an image name; it must lie inside the folder of images."""
    folder = Path(images or ".").resolve()
    try:
        path = (folder / str(image)).resolve()
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise DataError(f"{name}: image {image[:80]!r} is no file name ({error})") from None
    if not path.is_relative_to(folder):
        raise DataError(f"{name}: image {image!r} lies outside the image folder {folder}")
    if not there:
        raise DataError(f"{name}: no image {image!r} in {folder}; point --images at its folder")
    return path


def image_content(name: str, source: Source | bytes) -> Path | bytes:
    """Return the path of an image file, or the bytes that a parquet file holds."""
    try:
        content = source.read() if isinstance(source, ParquetImage) else source
    except Exception as error:  # of pyarrow, or of a file that is gone
        raise DataError(f"{name}: {source.file} cannot be read ({error})") from None
    if not content:
        raise DataError(f"{name}: the image holds no bytes")
    return content


def open_image(name: str, source: Source | bytes) -> Image.Image:
    """Return an RGB picture, upright, transparency on white; a DataError begins with `name`."""
    label = "its bytes" if isinstance(source, bytes) else source.name or "in the parquet file"
    content = image_content(name, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file makes decoders raise anything
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise DataError(f"{name}: cannot read image {label} ({reason}); only complete JPEG, PNG "
                        "and WebP files") from None
