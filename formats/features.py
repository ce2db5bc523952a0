"""Features of the frozen vision tower: computed once per image, in batches, before the first step.

Rows that show the same image share its features. Up to LIMIT bytes of features stay in memory; more
go to a memory-mapped file in the run's folder, which vanishes with the process, even a killed one.
"""

import collections
import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import parallel
from formats.rows import DataError, Source, image_content, open_image
from model import LLaVA, product_dtype
from vision import ImageSettings, preprocess

LIMIT = 1_000_000_000  # bytes of features kept in memory
BATCH = 32  # rows per pass through the tower
THREADS = min(16, os.cpu_count() or 4)  # that decode and resize images

Named = Sequence[tuple[str, Source | None]]  # per row: file and row number, and the image


@dataclass
class Features:
    """The features of rows: `features[i]` is (patches, D_vision), or None if there is no image."""

    store: Tensor  # (images, patches, D_vision) on the CPU, each distinct image once
    entries: list[int | str | None]  # per row: place in the store, error message, or None
    digests: list[str]  # of the images in the store: hashes of their files and of `ImageSettings`

    def __getitem__(self, row: int) -> Tensor | None:
        """Return a row's features; DataError if its image could not be read."""
        entry = self.entries[row]
        if isinstance(entry, str):
            raise DataError(entry)
        return None if entry is None else self.store[entry]

    def digest(self, row: int) -> str:
        """Identify what the tower reads, which unlike features does not depend on rounding."""
        return "" if self[row] is None else self.digests[self.entries[row]]


def size(model: LLaVA, named: Named) -> tuple[int, int, int]:
    """Return (images, patches, D_vision), the largest store that these rows can need."""
    images = len({source for _, source in named if source is not None})
    return images, model.config.vision.patches, model.config.vision.hidden_size


def encode_images(
    model: LLaVA, settings: ImageSettings, named: Named, folder: Path, stop: bool
) -> Features:
    """Compute the features of the rows' images, and keep them in the dtype of matrix products.

    Args:
        named: name and image of each row; None where a row has no image.
        folder: where more than LIMIT bytes of features go.
        stop: raise at the first image that cannot be read; False raises when its row is read.

    Raises:
        DataError: an image cannot be read.
        ValueError: the disk has no room for them.
    """
    shape, dtype = size(model, named), product_dtype(model.head.weight)
    small = math.prod(shape) * dtype.itemsize <= LIMIT
    store = torch.empty(shape, dtype=dtype) if small else mapped(folder, shape, dtype)
    return Features(store, *fill(store, model, settings, named, stop))


def mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in an unlinked file; ValueError if the disk has no room for it."""
    file, count = folder / "features.bin", math.prod(shape)
    parallel.once(lambda: reserve(file, count * dtype.itemsize))
    store = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
    parallel.total([0])  # wait until every process has it open
    parallel.once(file.unlink)
    return store


def reserve(file: Path, size: int) -> None:
    """Allocate a file of `size` bytes, so that a full disk is an error here, not a crash later."""
    with file.open("wb") as out:
        try:
            os.posix_fallocate(out.fileno(), 0, size)
        except OSError as error:
            file.unlink()
            raise ValueError(f"{file}: no {size / 1e9:.1f} GB for image features "
                             f"({error.strerror}); choose another --out") from None


@torch.no_grad()
def fill(
    store: Tensor, model: LLaVA, settings: ImageSettings, named: Named, stop: bool
) -> tuple[list[int | str | None], list[str]]:
    """Write the features of every distinct image; return `Features.entries` and its digests."""
    entries: list[int | str | None] = []
    digests: list[str] = []
    known: dict = {None: None}  # image -> its place in the store, or why it cannot be read
    used, size = 0, BATCH * parallel.world()
    bar = tqdm(total=len(named), desc="images", disable=None, leave=False)
    with contextlib.closing(decode_ahead(named, settings, size)) as parts, bar:
        for part, keys, pixels in parts:
            failed = {key: each for key, each in pixels.items() if isinstance(each, str)}
            found = torch.empty(0, *store.shape[1:], dtype=store.dtype)
            readable = {key: each[1] for key, each in pixels.items() if key not in failed}
            if readable:
                batch = torch.stack([pixels[key][0] for key in readable]).to(model.head.weight)
                found = model.image_features(batch).cpu()
            for faults, theirs, values in parallel.gather([(failed, readable, found)]):
                store[used : used + len(values)] = values
                known |= faults | dict(zip(theirs, range(used, used + len(values))))
                digests += theirs.values()
                used += len(values)
            for (name, _), key in zip(part, keys):
                entries.append(name + known[key] if isinstance(known[key], str) else known[key])
                if isinstance(known[key], str) and stop:
                    raise DataError(entries[-1])
            bar.update(len(part))
    return entries, digests


def decode_ahead(
    named: Named, settings: ImageSettings, size: int
) -> Iterator[tuple[Named, list, dict[object, tuple[Tensor, str] | str]]]:
    """Yield rows, their images' keys, and `tower_input` of this process's new ones.

    Meanwhile, threads read and decode the images of the next rows.
    """
    seen, ahead = {None}, collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(named), size):
            part = named[start : start + size]
            contents = [identify(source) for _, source in part]  # read in order
            new = {key: content for key, content in contents if key not in seen}
            seen |= new.keys()
            mine = list(new)[parallel.rows_of(len(new))]
            jobs = {key: pool.submit(tower_input, new[key], settings) for key in mine}
            ahead.append((part, [key for key, _ in contents], jobs))
            if len(ahead) > 1:
                part, keys, jobs = ahead.popleft()
                yield part, keys, {key: job.result() for key, job in jobs.items()}
        for part, keys, jobs in ahead:
            yield part, keys, {key: job.result() for key, job in jobs.items()}


def identify(source: Source | None) -> tuple[object, Path | bytes | DataError]:
    """Return an image's key (its path, or a hash of its bytes), and what to open, or the error."""
    try:
        content = image_content("", source)
    except DataError as error:  # no image, or a bad one
        return source, error
    return hashlib.sha256(content).digest() if isinstance(content, bytes) else content, content


def tower_input(
    image: Path | bytes | DataError, settings: ImageSettings
) -> tuple[Tensor, str] | str:
    """Return pixels (3, size, size) and a digest, or an error message without the row's name."""
    if isinstance(image, DataError):
        return str(image)
    try:
        picture = open_image("", image)
    except DataError as error:
        return str(error)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(image if isinstance(image, bytes) else image.read_bytes())
    return (preprocess(picture, settings.size, settings.mean, settings.std, settings.mode),
            digest.hexdigest())
