"""Files that a crash cannot leave half written, and safetensors read by their headers.

Whatever is written here is complete or absent: a file or folder is made under another name, forced
onto the disk, and renamed. Weights are memory-mapped: names, shapes and dtypes come from the
header, and nothing else is read before it is touched. Pickled weights could run code when opened;
they are refused, with the command that converts them.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def sentence(error: Exception) -> str:
    """An error as a user shall read it: ours as it is, the system's as its file and its reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}"
    return str(error)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence about what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
    """Write a file so that a reader, or a crash, sees the old content or the new, nothing between.

    Args:
        content: text, bytes, or anything JSON can hold.
    """
    path = Path(path)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which takes the name `path` only once it is complete on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors lets only the owner read
            sync(file)
        sync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder, made if need be, that no other process can claim meanwhile; removed if left empty.

    The claim is the system's lock on the folder itself: a killed process leaves none behind.

    Raises:
        ValueError: another process has claimed it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another run is at work in it; choose another --out") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty, as a rule
                folder.rmdir()
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Remove what is in a folder, not the folder."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


class WeightFile:
    """An entry of a safetensors file: shape and dtype from the header, values on demand."""

    def __init__(self, file: Path, name: str, handle):
        self.file, self.name, self.handle = file, name, handle
        header = handle.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), header.get_dtype()

    def read(self) -> Tensor:
        """The stored values, memory-mapped: nothing is read before it is touched."""
        return self.handle.get_tensor(self.name)


def open_file(file: Path) -> dict[str, WeightFile]:
    try:
        handle = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); download or copy it again"
        ) from None
    return {name: WeightFile(file, name, handle) for name in handle.keys()}


def open_weights(folder: Path) -> dict[str, WeightFile]:
    """Everything stored in a folder, under the names of its files.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: weights that are only there as pickles, or a broken file.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")
    if index.exists():
        weights = {}
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{index}: names {shard}, which is not in the folder")
            weights |= open_file(folder / shard)
        return weights
    if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")):
        raise ValueError(
            f"{pickles[0]}: pickled weights can run code and are not opened; "
            f"convert them once with: python checkpoint.py {folder}"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def convert_pickles(folder: Path) -> None:
    """Write safetensors and an index beside pickled weights; only plain tensors are unpickled."""
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(
        path for path in (*folder.glob("*.bin"), *folder.glob("*.pth"))
        if path.name != "training_args.bin"
    )
    if not pickles:
        raise FileNotFoundError(f"{folder}: no *.bin or *.pth file to convert")
    weight_map = {}
    for i, pickle in enumerate(pickles, 1):
        try:
            tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
            # Copies, because safetensors cannot hold two names for one storage.
            tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{pickle}: not a plain file of weights ({reason})") from None
        name = f"model-{i:05}-of-{len(pickles):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        print(f"{pickle} -> {name}: {len(tensors)} tensors")
    write_atomic(folder / "model.safetensors.index.json", {"weight_map": weight_map})
