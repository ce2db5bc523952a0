"""From files to rows and pictures: JSON lines, JSON arrays, parquet, and the images they name.

Which of these a file is, its content tells and never its name. Images stay where they are until
somebody opens them: a row holds a name, or a place in a parquet file, so that a data set of any
size fits. What the rows mean is told by `readers.py`.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path

from PIL import Image, ImageOps

from vision import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")  # the only decoders that ever see a user's file


class DataError(ValueError):
    """Something in a user's file is wrong; the message names the file, the row and the remedy."""


@contextlib.contextmanager
def skipping(skip: list[str] | None) -> Iterator[None]:
    """Bad data in this block is collected in `skip`, or raised if that is None."""
    try:
        yield
    except DataError as error:
        if skip is None:
            raise
        skip.append(str(error))


# -------------------------------------------------------------------------------- from file to rows


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The files of names and glob patterns, those of one pattern in alphabetical order."""
    paths = []
    for pattern in patterns:
        found = sorted(glob(str(pattern), recursive=True))
        found = found or ([pattern] if Path(pattern).exists() else [])  # a name with [brackets]
        if not found:
            raise DataError(f"{pattern}: no such file")
        paths.extend(Path(path) for path in found)
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: a folder; name its files, for example '{path}/*.parquet'")
    return paths


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(name, row) of a parquet file, a JSON array or JSON lines, whichever the content is.

    Names are file and row, counted from 1. A row that cannot be read comes as a DataError in its
    place; a file that cannot be read raises one.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if start.startswith(b"PAR1") or path.suffix == ".parquet":
        return read_parquet(path)
    is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return read_array(path) if is_array else read_jsonl(path)


def whole_rows(path: Path) -> Iterator[tuple[str, object]]:
    """`read_rows`, but the first row that cannot be read raises its DataError."""
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
        raise DataError(f"{path}: not valid JSON ({error}); is the file whole?") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def open_parquet(path: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has many
        raise DataError(f"{path}: not a whole parquet file ({error})") from None


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """Rows of one row group in memory at a time, without the bytes of their images."""
    table, number = open_parquet(path), 0
    fields = {f.name: str(f.type) for f in table.schema_arrow}
    embedded = fields.get("image", "").startswith(("struct", "binary", "large_binary"))
    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    wanted = [leaf for leaf in leaves if not (embedded and leaf in ("image", "image.bytes"))]
    for group in range(table.num_row_groups):
        try:
            rows = table.read_row_group(group, wanted).to_pylist()
            rows = rows or [{} for _ in range(table.metadata.row_group(group).num_rows)]
        except Exception as error:
            raise DataError(f"{path}: row group {group + 1} cannot be read ({error})") from None
        for i, row in enumerate(rows):
            number += 1
            name = f"{path} row {number}"
            if embedded:
                called = (row.get("image") or {}).get("path") or row.get("image_path") or ""
                row["image"] = ParquetImage(path, group, i, str(called))
            if str(row.get("text", "")).startswith("{"):  # RLHF-V: question and answers as JSON
                try:
                    row |= json.loads(row["text"])
                except (ValueError, RecursionError) as error:
                    row = DataError(f"{name}: text is not valid JSON ({error})")
            yield name, row


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file, read when it is asked for."""

    file: Path
    group: int  # row group
    row: int  # within the group
    name: str  # what the data set calls it; may be empty

    def read(self) -> bytes | None:
        changed = self.file.stat().st_mtime_ns
        cell = image_column(self.file, changed, self.group)[self.row].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell


Source = Path | bytes | ParquetImage  # where an image is


@lru_cache(maxsize=1)
def image_column(file: Path, changed: int, group: int):
    """The images of one row group. The last group asked for is kept, as rows come in order."""
    return open_parquet(file).read_row_group(group, ["image"]).column("image")


def image_path(name: str, image: str, images: str | Path | None) -> Path:
    """The file of an image name; it must lie inside the folder of images."""
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


def image_content(name: str, source: Source) -> Path | bytes:
    """A file, or the bytes that a parquet file holds."""
    content = source
    if isinstance(source, ParquetImage):
        try:
            content = source.read()
        except DataError:
            raise
        except Exception as error:  # of pyarrow, or of a file that is gone
            raise DataError(f"{name}: {source.file} cannot be read ({error})") from None
    if not content:
        raise DataError(f"{name}: the image holds no bytes")
    return content


def open_image(name: str, source: Source) -> Image.Image:
    """A decoded RGB picture, upright, transparency on white; or a DataError that names the row."""
    label = "its bytes" if isinstance(source, bytes) else source.name or "in the parquet file"
    content = image_content(name, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file leads decoders anywhere
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise DataError(
            f"{name}: cannot read image {label} ({reason}); only whole JPEG, PNG and WebP files"
        ) from None
