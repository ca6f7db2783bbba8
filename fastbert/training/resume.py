"""What a stopped run goes on with, refused where it is damaged or of another run."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastbert.models import upstream
from fastbert.training.errors import DataError

SETTINGS = "fastbert.json"
_STATE = "trainer_state.json"
_WEIGHTS = "model.safetensors"
_OPTIMIZER, _SCHEDULER, _RANDOM = "optimizer.pt", "scheduler.pt", "rng_state.pth"
# What one process writes, and Trainer reads without a look at what it holds.
_SEALED = (_STATE, "config.json", _WEIGHTS, _OPTIMIZER, _SCHEDULER, _RANDOM)
_CHECKSUMS = "checksums.json"
_NAME = re.compile("checkpoint-[0-9]+")
_BLOCK_BYTES = 1 << 20


def check_same(output: Path, wanted: dict[str, Any]) -> None:
    """Compare what is asked for with what the run in ``output`` is.

    Raises:
        DataError: there is none, its record is damaged, or it has other settings.
    """
    path = output / SETTINGS
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"--output {output} has no run to resume; without --resume one begins") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged, so nothing says what the run in {output} is; --overwrite begins again")
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        name = changed[0]
        raise DataError(
            f"--output {output} holds a run with {name} {found.get(name)}, and {wanted[name]} is asked for; "
            "--resume needs the same settings"
        )


def last_checkpoint(output: Path, processes: int, sharded: bool) -> Path | None:
    """The last checkpoint that was written to its end; Hugging Face writes its state last.

    Args:
        output: the run's folder.
        processes: how many it has; each keeps the state of its random numbers.
        sharded: whether the weights and the optimizer's state are in shards.

    Raises:
        DataError: a file of it is missing or damaged.
    """
    found = [path for path in checkpoints(output) if _load(path / _STATE) is not None]
    if not found:
        return None
    last = found[-1]
    state = _load(last / _STATE)
    if not isinstance(state, dict) or state.get("global_step") != _step(last):
        raise _unusable(last / _STATE, "damaged")
    archives = [_SCHEDULER]
    archives += [f"rng_state_{process}.pth" for process in range(processes)] if processes > 1 else [_RANDOM]
    if not sharded:
        archives.append(_OPTIMIZER)
        _check(last / _WEIGHTS, _is_sound_safetensors)
    for name in archives:
        _check(last / name, _is_sound_archive)
    sums = _sums(last)
    for name in _SEALED:
        if name in sums:
            _check(last / name, lambda path: _crc32(path) == sums[path.name])
    return last


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the run in ``output``, by step; what users have put there under other names is theirs."""
    return sorted((path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step)


def thin(output: Path, count: int, best: str | None) -> None:
    """Take the oldest checkpoints away, so that ``count`` are left, but neither the last one nor the ``best``."""
    found = checkpoints(output)
    spare = [path for path in found[:-1] if best is None or path.name != Path(best).name]
    for path in spare[: max(0, len(found) - count)]:
        shutil.rmtree(path, ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Note checksums of a checkpoint's files, when all of them are there.

    They tell what a file's own format doesn't: that another number, or another run's file, stands there.
    """
    sums = {name: _crc32(checkpoint / name) for name in _SEALED if (checkpoint / name).is_file()}
    new = checkpoint / f"{_CHECKSUMS}.new"
    new.write_text(f"{json.dumps(sums, indent=1)}\n", "utf-8")
    os.replace(new, checkpoint / _CHECKSUMS)


def _sums(checkpoint: Path) -> dict[str, int]:
    """What ``seal`` noted; nothing where the run was killed before it came to that."""
    path = checkpoint / _CHECKSUMS
    if not path.exists():
        return {}
    found = _load(path)
    if not isinstance(found, dict):
        raise _unusable(path, "damaged")
    return found


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found = zlib.crc32(block, found)
    return found


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _load(path: Path) -> Any:
    """What a JSON file holds; None where it isn't there, or isn't whole."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def _check(path: Path, is_sound: Any) -> None:
    if not path.is_file():
        raise _unusable(path, "missing")
    if not is_sound(path):
        raise _unusable(path, "damaged")


def _unusable(path: Path, how: str) -> DataError:
    return DataError(f"{path} is {how}; without {path.parent} --resume goes on from the checkpoint before")


def _is_sound_archive(path: Path) -> bool:
    """Whether a file of ``torch.save`` is as it was written.

    It is a zip archive, which holds a checksum of each of its parts. Torch compares none, and looks at places of its
    own, so both must read it; torch only where Trainer's list of what is safe is still to be found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        allowed = upstream.safe_globals()
        if allowed is None:
            return True
        with allowed:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what is raised depends on where the damage is
        return False
    return True


def _is_sound_safetensors(path: Path) -> bool:
    """Whether a file has the length that its head tells."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
