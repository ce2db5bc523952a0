"""The folder of a run: when a run may write there, what it replaces, and when it is finished."""

import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import parallel
from config import MEMORY, TRANSIENT, VERSION, Run, Training
from formats.files import read_json, remove, remove_leftovers, write_atomic
from formats.state import latest_state

# All that a run writes into its folder; nothing else is deleted there. config.json proves that the
# folder is a run's, so it goes last.
WRITTEN = ("checkpoint-*", "model", "adapter", "tensorboard", "*_head.safetensors", "request.txt",
           "features.bin", "metrics.jsonl", "samples.jsonl", "pairs.json", "reference.json",
           "results.json", "report.html", "config.json")
ASIDE = ".replaced"  # subfolder for the old files that a new run replaces after its first step


def settings_of(run: Run, config: Training) -> dict:
    """Return the settings that decide a run's result."""
    return {k: v for k, v in {**asdict(run), **asdict(config)}.items() if k not in TRANSIENT}


def settings_of_run(folder: Path) -> dict | None:
    """Return the settings of the run in a folder; None if its config.json is absent or not ours."""
    with contextlib.suppress(ValueError, OSError, LookupError, TypeError):
        content = read_json(folder / "config.json")
        if "plumbline" in content["versions"] and isinstance(content["settings"], dict):
            return content["settings"]
    return None


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a run that has written all its outputs."""
    return (settings_of_run(folder) is not None and (folder / "report.html").exists()
            and not latest_state(folder))


def set_aside(folder: Path, run: Run, config: Training) -> None:
    """Move the files that a run wrote, and nothing else, into ASIDE.

    Raises:
        ValueError: an input of this run is among them.
    """
    written = [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]
    names = ("model", "tower", "images", "reward_model", "held_out_reward_model", "captions",
             "request")
    read = [*(run.data or ()), *(getattr(run, n, None) or getattr(config, n, None) for n in names)]
    for each in map(Path, filter(None, read)):
        inside = [each / "model"] if (each / "model").is_dir() else []  # of a run's folder
        file = each / "adapter_config.json"
        while file.exists() and file.parent not in inside[:-1]:  # an adapter's base may be another
            inside.append(Path(str(read_json(file).get("base_model_name_or_path"))))
            file = inside[-1] / "adapter_config.json"
        for place in (each, *inside):
            if any(place.resolve().is_relative_to(path.resolve()) for path in written):
                raise ValueError(f"{each} is an input of this run, which would overwrite it in "
                                 f"{folder}; choose another --out")
    (folder / ASIDE).mkdir()
    for path in written:
        path.rename(folder / ASIDE / path.name)


def restore(folder: Path) -> None:
    """Put back the files set aside, over those of a run that did not complete a step."""
    if (aside := folder / ASIDE).exists():
        for path in sorted(aside.iterdir()):
            if (new := folder / path.name).exists():
                remove(new)
            path.rename(new)
        aside.rmdir()


def read_replaced(path: Path) -> dict:
    """Return the content of a JSON file set aside; an empty dict if it is absent or broken."""
    with contextlib.suppress(ValueError, OSError):
        return read_json(path.parent / ASIDE / path.name)
    return {}


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Put the files set aside back if this block fails before `discard_replaced` deletes them."""
    try:
        yield
    except BaseException:
        if not parallel.rank():
            restore(folder)
        raise


def discard_replaced(folder: Path) -> None:
    """Delete the files set aside."""
    if not parallel.rank() and (folder / ASIDE).exists():
        remove(folder / ASIDE)


def open_folder(folder: Path, run: Run, config: Training, about: str, reads: str) -> bool | None:
    """Prepare the output folder and write its config.json; set an old run's files aside.

    Return True if the run resumes, False if it starts anew, None if it has finished already.
    """
    settings, file = settings_of(run, config), folder / "config.json"
    remove_leftovers(folder)
    restore(folder)
    old, state = settings_of_run(folder), latest_state(folder)
    if old is None and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of ours; choose another --out")
    if old is None and run.resume:
        raise ValueError(f"{folder} holds no run to resume")
    if old is not None and not run.overwrite:
        names = (old.keys() | settings.keys()) - MEMORY - {"out"}  # a folder may have several
        changed = sorted(name for name in names if old.get(name) != settings.get(name))
        if changed and (run.resume or state or (folder / "metrics.jsonl").exists()):
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ); "
                "choose another --out, or --overwrite it")
        if state and not run.resume:
            raise ValueError(
                f"{folder} holds an unfinished run; --resume continues, --overwrite restarts it")
    if run.resume and is_finished(folder):
        return None
    resume = run.resume and state is not None  # nothing saved: start anew
    if not resume:
        if is_finished(folder):
            print(f"{folder}: replacing the finished run", file=sys.stderr)
        set_aside(folder, run, config)
    versions = {"plumbline": VERSION, "torch": torch.__version__,
                "python": platform.python_version()}
    try:
        write_atomic(file, {
            "settings": settings, "versions": versions, "about": about, "reads": reads})
    except OSError:  # a full disk
        restore(folder)
        raise
    return resume
