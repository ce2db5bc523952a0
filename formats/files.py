"""Atomic files and folders, and mapped weights.

A file or folder written here is complete or absent: it is made under another name, forced onto the
disk, and renamed. Weights are memory-mapped: the disk is read only when a value is used. A pickle
may hold plain tensors and values only, so it cannot run code.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def error_message(error: Exception, folder: Path | str = "") -> str:
    """Format an error as one line: ours unchanged, the system's as file and reason.

    Args:
        folder: where the run writes, for a system's error that names no file.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full; make room and resume" if full else error.strerror.lower()
        text = f"{error.filename or folder}: {reason}"
    lines = text.split("\n")  # some errors repeat a file's content
    return "\n".join(f"{x[:400]} ... {x[-200:]}" if len(x) > 700 else x for x in lines)


def brief(value: object) -> str:
    """Return a value's repr for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_json(content: bytes) -> object:
    """Parse JSON in UTF-8; ValueError also for a duplicate key, deep nesting, half a character."""
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
        if re.search(rb"\\u[dD][89a-fA-F]", content):  # surrogates, which should stand in pairs
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half a character (a lone surrogate)") from None
    return value


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict of pairs; ValueError for a duplicate key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{brief(twice)} is given more than once")
    return found


def read_json(path: Path, optional: bool = False) -> dict:
    """Read a JSON object, {} if an optional file is missing; errors name the file and the fault."""
    if optional and not path.exists():
        return {}
    try:
        if path.exists() and not path.is_file():  # a pipe could block for ever
            raise ValueError("not a regular file")
        values = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; is its folder the right one?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object; copy the file again")
    return values


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path | str, content: str | bytes | dict | list) -> None:
    """Write text, bytes or JSON; readers find the old content or the new, even after a crash."""
    path = Path(path)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path.parent)


def jsonl(rows: Iterable) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `path` once it is complete on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with full_disk(path):
            yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors lets only the owner read
            sync(file)
        sync(temporary)
        old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Raise OSError in place of safetensors' own error, which means a full disk."""
    try:
        yield
    except SafetensorError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Make a folder and lock it against other processes; remove it afterwards if it is empty.

    The system drops the lock when this process ends, even if killed. Raises ValueError for a file,
    and, unless `wait`, for a folder that another process has locked.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --out")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder}: another run is using it; choose another --out") from None
        if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
            break
        os.close(handle)  # the process that had the lock has removed the folder
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # usually it is not empty
            folder.rmdir()
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder; renamed first, it disappears at once."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders of killed processes, of all names or of one.

    A folder that was moved aside comes back if the one to replace it did not take its name.
    """
    for leftover in folder.glob(f".{glob.escape(name) or '*'}.[0-9]*.tmp"):
        replaced = re.fullmatch(r"\.(.*)\.\d+\.old\.tmp", leftover.name)
        if replaced and not (path := folder / replaced[1]).exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def understood(file: Path | str) -> Iterator[None]:
    """Turn the errors that values of wrong types cause into a ValueError that names the file."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: a field has an invalid value "
                         f"({type(error).__name__}: {brief(str(error))}); copy it again") from None


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; equal contents give equal bytes.

    The library writes the metadata's keys in random order; here they are sorted.
    """
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")  # of the tensors' data
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(file, len(text).to_bytes(8, "little") + text + content[start:])


def open_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's mapped tensors and its metadata; ValueError if it is broken."""
    try:
        with safe_open(file, "pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); "
                         "download or copy it again") from None


def open_pickle(file: Path) -> dict:
    """Return a pickle of plain values, its tensors memory-mapped; ValueError for other files."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # from the system, zip, pickle or torch
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: not a complete file of plain values ({reason}); "
                         "use another copy") from error


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a model's folder, memory-mapped, by public name.

    A missing or broken file is a FileNotFoundError or ValueError.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")[0]
    if index.exists():
        with understood(index):
            shards = sorted(set(read_json(index)["weight_map"].values()))
            if not all(shard == Path(shard).name for shard in shards):
                raise ValueError(f"{index}: names a file outside its folder")
        return {k: tensor for shard in shards for k, tensor in open_file(folder / shard)[0].items()}
    others = {*folder.glob("*.bin"), *folder.glob("*.pth")} - {folder / "training_args.bin"}
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(others)
    if not pickles:
        raise FileNotFoundError(f"{folder}: no model.safetensors, {index.name} or *.bin")
    return {k: tensor.detach() for file in pickles for k, tensor in open_pickle(file).items()}
