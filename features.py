"""What the frozen tower sees in every image: computed once, in batches, before the first step.

Rows that show the same image share its features. Up to LIMIT bytes of them are kept in memory;
more go to a memory-mapped file in the run's folder, where `--resume` finds them again. Such a file
belongs to one model, one way of preprocessing and one list of images, and is refused for others.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import fingerprint
from data import split
from files import read_json, sync, write_atomic
from model import LLaVA
from rows import DataError, ParquetImage, Source, image_content, open_image
from vision import ImageSettings, preprocess

LIMIT = 1_000_000_000  # bytes of features that are kept in memory
BATCH = 32  # rows looked at together
THREADS = 4  # that decode and resize images

Named = Sequence[tuple[str, Source | None]]  # file and row; where its image is


@dataclass
class Features:
    """The features of rows: `features[i]` is (patches, D_vision), or None if there is no image."""

    store: Tensor  # (images, patches, D_vision) on the CPU, each different image once
    places: list[int]  # of each row in the store; -1: none
    problems: dict[int, str]  # rows whose image cannot be read

    def __getitem__(self, row: int) -> Tensor | None:
        """DataError if the row's image could not be read."""
        if row in self.problems:
            raise DataError(self.problems[row])
        return None if self.places[row] < 0 else self.store[self.places[row]]


def size(model: LLaVA, named: Named) -> tuple[int, int, int]:
    """(images, patches, D_vision) of the store that these rows need at most."""
    images = len({source for _, source in named if source is not None})
    return images, model.config.vision.patches, model.config.vision.hidden_size


def look(
    model: LLaVA, settings: ImageSettings, named: Named, folder: Path | None = None,
    stop: bool = True,
) -> Features:
    """Features of the images of rows.

    Args:
        named: name and image of each row; None where a row has no image.
        folder: where a file of features goes if memory should not hold them; None: always memory.
        stop: raise at the first image that cannot be read, and not only when its row is asked for.

    Raises:
        DataError: an image cannot be read.
        ValueError: the folder holds features of another model, other images or settings.
    """
    shape, dtype = size(model, named), model.head.weight.dtype
    count = math.prod(shape) * dtype.itemsize
    if folder is None or count <= LIMIT:
        store = torch.empty(shape, dtype=dtype)
        return Features(store, *fill(store, model, settings, named, stop))
    file, index = folder / "features.bin", folder / "features.json"
    key = cache_key(model, settings, named)
    saved = read_json(index) if index.exists() else None
    if saved and (saved["key"] != key or not file.exists() or file.stat().st_size != count):
        raise ValueError(
            f"{file} belongs to another model, other images or settings; delete it and {index.name}"
        )
    if not saved:
        reserve(file, count)
    store = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    if not saved:
        places, problems = fill(store, model, settings, named, stop)
        sync(file)
        saved = {"key": key, "places": places, "problems": list(problems.items())}
        write_atomic(index, saved)
    return Features(store, saved["places"], dict(saved["problems"]))


def reserve(file: Path, count: int) -> None:
    """Make a file of `count` bytes; a full disk is noticed here, where it is no crash yet."""
    with file.open("wb") as out:
        try:
            os.posix_fallocate(out.fileno(), 0, count)
        except OSError as error:
            file.unlink()
            raise ValueError(f"{file}: no {count / 1e9:.1f} GB for image features "
                             f"({error.strerror}); choose another --out") from None


def cache_key(model: LLaVA, settings: ImageSettings, named: Named) -> str:
    """A hash of all that decides the features: weights, layer, dtype, preprocessing, images."""
    about = (fingerprint(model), model.config.vision_feature_layer, str(model.head.weight.dtype),
             asdict(settings))
    digest = hashlib.sha256(repr(about).encode())
    for _, source in named:
        place: tuple = ()
        if isinstance(source, ParquetImage):
            place, source = (source.group, source.row), source.file
        if isinstance(source, Path):  # its name, size and time of change stand for its content
            stat = source.stat()
            place += (str(source.resolve()), stat.st_size, stat.st_mtime_ns)
        elif source is not None:
            place = (hashlib.sha256(source).hexdigest(),)
        digest.update(repr(place).encode())
    return digest.hexdigest()


@torch.no_grad()
def fill(
    store: Tensor, model: LLaVA, settings: ImageSettings, named: Named, stop: bool
) -> tuple[list[int], dict[int, str]]:
    """Write every different image's features into the store; places and problems, by row."""
    places: list[int] = []
    problems: dict[int, str] = {}
    known: dict = {None: -1}  # image -> its place, or what is wrong with it
    used, like = 0, model.head.weight
    with ThreadPoolExecutor(THREADS) as pool:
        for part in tqdm(split(named, BATCH), desc="images", disable=None, leave=False):
            new: dict = {}  # in order: images not seen before, each with the name of its first row
            keys = []
            for name, source in part:
                key, content = identify(name, source)
                keys.append(key)
                if key not in known:
                    new.setdefault(key, (name, content))
            pixels = dict(zip(new, pool.map(lambda item: pixels_of(*item, settings), new.values())))
            good = [key for key, value in pixels.items() if isinstance(value, Tensor)]
            known |= {key: str(value).removeprefix(new[key][0]) for key, value in pixels.items()
                      if key not in good}
            if good:
                batch = torch.stack([pixels[key] for key in good]).to(like)
                store[used : used + len(good)] = model.image_features(batch).cpu()
                known |= {key: used + i for i, key in enumerate(good)}
                used += len(good)
            for (name, _), key in zip(part, keys):
                if isinstance(known[key], str):
                    problems[len(places)] = name + known[key]
                    if stop:
                        raise DataError(name + known[key])
                places.append(-1 if isinstance(known[key], str) else known[key])
    return places, problems


def identify(name: str, source: Source | None):
    """What tells images apart (a path, or a hash of the bytes), and what `open_image` opens."""
    try:
        content = source if source is None else image_content(name, source)
    except DataError as error:
        return source, error
    return hashlib.sha256(content).digest() if isinstance(content, bytes) else content, content


def pixels_of(name: str, content: Path | bytes | DataError, settings: ImageSettings):
    """The tower's input (3, size, size), or a DataError."""
    if isinstance(content, DataError):
        return content
    try:
        image = open_image(name, content)
    except DataError as error:
        return error
    return preprocess(image, settings.size, settings.mean, settings.std, settings.mode)
