"""The machine that a command runs on: its devices and the versions of what is installed."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

from fastbert._version import __version__
from fastbert.cli.errors import Refusal
from fastbert.cli.options import Device

# Tables keep this width where output goes to a file or a pipe, which have none of their own.
_PLAIN_WIDTH = 120


def console() -> Console:
    """A console on stdout, as wide as the terminal, that prints brackets as they are."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH, markup=False)


def choose_device(device: Device | None, threads: int | None) -> torch.device:
    """The device of that name, or the best there is; also sets the number of CPU threads.

    Raises:
        Refusal: cuda was asked for, and there is none.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == Device.cuda and not torch.cuda.is_available():
        raise Refusal(
            f"--device is cuda, and torch {torch.__version__} finds no CUDA device here; "
            "it may be cpu (`fastbert doctor` tells more)"
        )
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device) -> str:
    """The name of a processor or GPU, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str | None]:
    """Versions of fastbert and of what it builds on; None for what isn't installed."""
    return {
        "fastbert": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "triton": _installed("triton"),
        "flash-attn": _installed("flash-attn"),
        "cuda": torch.version.cuda,
    }


def memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give memory that is free back to the system.

    C's allocator keeps what tensors of ever other sizes leave behind, in pieces that fit none of the next ones, so a
    process that runs for long grows although it holds no more than before.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
