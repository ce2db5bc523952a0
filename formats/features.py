"""Features of the frozen vision tower: computed once per image, in batches, before the first step.

Rows that show the same image share its features. Up to LIMIT bytes of features stay in memory; more
go to a memory-mapped file in the run's folder, which ends with the process, killed or not.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from formats.rows import DataError, Source, image_content, open_image
from model import LLaVA
from vision import ImageSettings, preprocess

LIMIT = 1_000_000_000  # bytes of features that are kept in memory
BATCH = 32  # rows per pass through the tower
THREADS = 4  # that decode and resize images

Named = Sequence[tuple[str, Source | None]]  # of each row: file and row number; its image


@dataclass
class Features:
    """The features of rows: `features[i]` is (patches, D_vision), or None if there is no image."""

    store: Tensor  # (images, patches, D_vision) on the CPU, each different image once
    entries: list[int | str | None]  # of each row: place in the store, error message, or no image

    def __getitem__(self, row: int) -> Tensor | None:
        """Return a row's features; DataError if its image could not be read."""
        entry = self.entries[row]
        if isinstance(entry, str):
            raise DataError(entry)
        return None if entry is None else self.store[entry]


def size(model: LLaVA, named: Named) -> tuple[int, int, int]:
    """Return (images, patches, D_vision), the most that the store of these rows needs."""
    images = len({source for _, source in named if source is not None})
    return images, model.config.vision.patches, model.config.vision.hidden_size


def encode_images(
    model: LLaVA, settings: ImageSettings, named: Named, folder: Path | None = None,
    stop: bool = True,
) -> Features:
    """Compute the features of the rows' images.

    Args:
        named: name and image of each row; None where a row has no image.
        folder: where more than LIMIT bytes of features go; None keeps any number in memory.
        stop: raise at the first image that cannot be read; False raises when its row is read.

    Raises:
        DataError: an image cannot be read.
        ValueError: the disk has no room for them.
    """
    shape, dtype = size(model, named), model.head.weight.dtype
    small = folder is None or math.prod(shape) * dtype.itemsize <= LIMIT
    store = torch.empty(shape, dtype=dtype) if small else mapped(folder, shape, dtype)
    return Features(store, fill(store, model, settings, named, stop))


def mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in a file without a name; ValueError if the disk has no room for it."""
    file, count = folder / "features.bin", math.prod(shape)
    with file.open("wb") as out:
        try:
            os.posix_fallocate(out.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
        except OSError as error:  # here, and no crash later
            raise ValueError(f"{file}: no {count * dtype.itemsize / 1e9:.1f} GB for image features "
                             f"({error.strerror}); choose another --out") from None
        finally:
            file.unlink()


@torch.no_grad()
def fill(
    store: Tensor, model: LLaVA, settings: ImageSettings, named: Named, stop: bool
) -> list[int | str | None]:
    """Write the features of every different image into the store; return `Features.entries`."""
    entries: list[int | str | None] = []
    known: dict = {None: None}  # image -> its place in the store, or why it cannot be read
    used = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in tqdm(range(0, len(named), BATCH), desc="images", disable=None, leave=False):
            part = named[start : start + BATCH]
            contents = [identify(source) for _, source in part]
            new = {key: content for key, content in contents if key not in known}
            known |= zip(new, pool.map(lambda image: tower_input(image, settings), new.values()))
            readable = [key for key in new if isinstance(known[key], Tensor)]
            if readable:
                batch = torch.stack([known[key] for key in readable]).to(model.head.weight)
                store[used : used + len(readable)] = model.image_features(batch).cpu()
                known |= zip(readable, range(used, used + len(readable)))
                used += len(readable)
            for (name, _), (key, _) in zip(part, contents):
                failed = isinstance(known[key], str)
                entries.append(name + known[key] if failed else known[key])
                if failed and stop:
                    raise DataError(entries[-1])
    return entries


def identify(source: Source | None) -> tuple[object, Source | bytes | None]:
    """Return what tells images apart (a path, or a hash of the bytes), and what to open."""
    content = source
    with contextlib.suppress(DataError):  # no image, or a bad one: opening it raises this again
        content = image_content("", source)
    return hashlib.sha256(content).digest() if isinstance(content, bytes) else content, content


def tower_input(image: Source | bytes, settings: ImageSettings) -> Tensor | str:
    """Return pixels (3, size, size), or an error message that lacks only the row's name."""
    try:
        picture = open_image("", image)
    except DataError as error:
        return str(error)
    return preprocess(picture, settings.size, settings.mean, settings.std, settings.mode)
