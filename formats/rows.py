"""From files to rows and pictures: JSON lines, JSON arrays, parquet, and the images they name.

The content of a file decides its format; of names, only `.parquet` counts. Images stay on disk
until they are opened: a row holds a file name or a place in a parquet file, so data sets of any
size fit in memory. `readers.py` interprets the rows.
"""

import contextlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path

from PIL import ExifTags, Image

from formats.files import brief, parse_json
from vision import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders that open a user's file
# A small file can hold a gigantic picture, of which Pillow only warns. Turning warnings into errors
# is a setting that all threads share, so `open_image` checks the size itself.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# How to turn a picture upright, by its EXIF orientation.
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), 2))

LISTED = 20  # bad rows in one message, at most


class DataError(ValueError):
    """A fault in a user's file; the message names the file, the row and the remedy."""


@contextlib.contextmanager
def skipping(skip: list[str] | None) -> Iterator[None]:
    """Collect the block's DataError in `skip`; raise it if that is None."""
    try:
        yield
    except DataError as error:
        if skip is None:
            raise
        skip.append(str(error))


def report_skipped(skip: list[str] | None) -> None:
    """Print to stderr how many rows were left out, and why; at most LISTED reasons."""
    if skip := list(dict.fromkeys(skip or ())):
        more = [f"and {len(skip) - LISTED} more"] if len(skip) > LISTED else []
        print(f"{len(skip)} rows left out:", *skip[:LISTED], *more, sep="\n  ", file=sys.stderr)


def refuse(bad: list[str], least: int = 1) -> None:
    """Raise a DataError that lists bad rows, up to LISTED, if there are at least `least`."""
    if len(bad) == 1 == least:
        raise DataError(bad[0])
    if len(bad) >= least:
        count = "many" if len(bad) > LISTED else len(bad)
        raise DataError("\n  ".join([f"{count} rows cannot be used (--skip_bad_rows leaves them "
                                     "out):", *bad[:LISTED]]))


# -------------------------------------------------------------------------------- from file to rows


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """Return the files that match names or glob patterns, each file once.

    Those of one pattern are in alphabetical order.
    """
    paths = []
    for pattern in patterns:
        whole = Path(pattern).exists()  # it may contain [brackets]
        found = [pattern] if whole else sorted(glob(str(pattern), recursive=True))
        if not found:
            raise DataError(f"{pattern}: no such file")
        for path in map(Path, found):
            if path.is_dir():
                raise DataError(f"{path}: a folder; name its files, for example '{path}/*.parquet'")
            if not path.is_file():  # a pipe could be read once, and only in order
                raise DataError(f"{path}: not a regular file; write the rows into one")
            paths.append(path)
    return list(dict.fromkeys(paths))


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Return (name, row) of each row of a parquet file, a JSON array or JSON lines.

    A name is file and row number, counted from 1. A DataError stands in place of a row that cannot
    be read; a file that is broken as a whole raises one.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1") or path.suffix == ".parquet":
        return read_parquet(path)
    is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return read_array(path) if is_array else read_jsonl(path)


def whole_rows(path: Path, kinds: type | tuple[type, ...] = dict) -> Iterator[tuple[str, object]]:
    """Yield the rows of `read_rows`; raise DataError for a bad row, or one not of these kinds."""
    for name, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, kinds):
            raise DataError(f"{name}: expected an object, found a {type(row).__name__}")
        yield name, row


def read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                name = f"{path} row {number}"
                try:
                    yield name, parse_json(line)
                except ValueError as error:  # of the JSON or of its encoding
                    yield name, DataError(f"{name}: not valid JSON ({error})")


def read_array(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = parse_json(path.read_bytes())
    except ValueError as error:
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
        # Read a part of a column at a time; by default pyarrow holds the whole row group.
        return parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except Exception as error:  # pyarrow raises many types
        raise DataError(f"{path}: not a complete parquet file ({error})") from None


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """Yield rows, one row group in memory at a time, without the bytes of their images."""
    table, number = open_parquet(path), 0
    kinds = {f.name: str(f.type) for f in table.schema_arrow}
    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    binary = re.compile(r"((large_)?list<\w+: )?(struct<(.*, )?bytes: )?(large_)?binary")
    column = next((name for name in ("image", "images") if binary.match(kinds.get(name, ""))), None)
    inside = [leaf for leaf in leaves if f"{leaf}.".startswith(f"{column}.")]
    leaf = next((leaf for leaf in inside if leaf.endswith(".bytes")), *inside[:1] or [None])
    for group in range(table.num_row_groups):
        # `datasets` may also store only an image's path, with null bytes.
        embedded = column and not all_null(table, group, leaves.index(leaf))
        columns = [each for each in leaves if not (embedded and each == leaf)]
        try:
            rows = table.read_row_group(group, columns).to_pylist()
            rows = rows or [{} for _ in range(table.metadata.row_group(group).num_rows)]
        except Exception as error:
            raise DataError(f"{path}: row group {group + 1} cannot be read ({error})") from None
        for i, row in enumerate(rows):
            number += 1
            name = f"{path} row {number}"
            if embedded and not (column in row and row[column] in (None, [])):  # has no image
                cell = row.get(column) or {}
                cells = cell if isinstance(cell, list) else [cell]
                if len(cells) > 1:
                    row = DataError(f"{name}: {len(cells)} images; a row has one")
                else:
                    file_name = ([*cells, {}][0] or {}).get("path") or row.get("image_path") or ""
                    row["image"] = ParquetImage(path, group, i, str(file_name), column)
            yield name, row


def all_null(table, group: int, leaf: int) -> bool:
    """Return whether a column of a parquet file's row group holds only nulls."""
    column = table.metadata.row_group(group).column(leaf)
    return column.statistics is not None and column.statistics.null_count == column.num_values


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file, read on demand."""

    file: Path
    group: int  # row group
    row: int  # within the group
    name: str  # file name in the data set; may be empty
    column: str = "image"

    def read(self) -> bytes | None:
        changed = self.file.stat().st_mtime_ns
        with READING:
            cell = stored_images(self.file, changed, self.group, self.column)[self.row]
        if isinstance(cell, list):
            cell = cell[0] if len(cell) == 1 else None
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        return content if isinstance(content, bytes) else None


Source = Path | ParquetImage  # where an image is


def in_file(source: Source) -> tuple:
    """Return a key that sorts images as they lie in their files, where reading them is fast."""
    if isinstance(source, ParquetImage):
        return str(source.file), source.group, source.row
    return str(source), 0, 0


class StoredImages:
    """The images of a row group, which may exceed memory: a few are held at a time.

    In order, each is read once; a step back starts again at the group's first.
    """

    def __init__(self, file: Path, group: int, column: str):
        self.table, self.place = open_parquet(file), (group, column)
        self.begin()

    def begin(self) -> None:
        group, column = self.place
        self.first, self.cells = 0, ()
        self.batches = self.table.iter_batches(AHEAD, [group], [column], use_threads=False)

    def __getitem__(self, row: int) -> object:
        if row < self.first:
            self.begin()
        while row >= self.first + len(self.cells):
            self.first += len(self.cells)
            self.cells = next(self.batches).column(0)
        return self.cells[row - self.first].as_py()


AHEAD = 16  # images of a row group that are read at once
READING = threading.Lock()  # one thread at a time moves through a row group


@lru_cache(maxsize=1)
def stored_images(file: Path, changed: int, group: int, column: str) -> StoredImages:
    """Return the images of one row group; the last group stays open, since rows come in order."""
    return StoredImages(file, group, column)


def image_path(name: str, image: str, images: str | Path | None) -> Path:
    """Return the file that an image name means; it must lie inside the folder of images."""
    folder = Path(images or ".").resolve()
    try:
        there = (folder / str(image)).resolve().is_file()
        path = Path(os.path.normpath(folder / str(image)))  # links are the user's own
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a loop
        raise DataError(f"{name}: image {brief(image)} is not a file name "
                        f"({getattr(error, 'strerror', None) or brief(str(error))})") from None
    if not path.is_relative_to(folder):
        raise DataError(f"{name}: image {brief(image)} lies outside the image folder {folder}")
    if not there:
        raise DataError(f"{name}: no image {brief(image)} in {folder}; point --images at its "
                        "folder")
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
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            turn = None
            with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            return to_rgb(image if turn is None else image.transpose(turn))
    except Image.DecompressionBombError:
        most = Image.MAX_IMAGE_PIXELS / 1e6
        raise DataError(f"{name}: cannot read image {label}: it has more than {most:.0f} million "
                        "pixels; make it smaller") from None
    except Exception as error:  # a broken file makes decoders raise anything
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise DataError(f"{name}: cannot read image {label} ({reason}); only complete JPEG, PNG "
                        "and WebP files") from None
