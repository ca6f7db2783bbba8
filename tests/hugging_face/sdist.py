"""The test files in the source distribution of the installed transformers, which the wheel doesn't carry."""

import pathlib
import subprocess
import sys
import tarfile
import tempfile

import transformers

CACHE = pathlib.Path(__file__).parents[2] / ".cache" / "hugging_face"


class UnavailableError(Exception):
    """The source distribution can't be fetched."""


def fetch() -> pathlib.Path:
    """The folder with Hugging Face's ``tests`` and their pytest settings, as published; downloaded once."""
    folder = CACHE / transformers.__version__
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        _download(temporary)
        (archive,) = pathlib.Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])]
            tar.extractall(temporary, wanted, filter="data")
        # Whole or not at all, whatever interrupts the lines above.
        (pathlib.Path(temporary) / archive.name.removesuffix(".tar.gz")).rename(folder)
    return folder


def _download(folder: str) -> None:
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", folder]
    try:
        subprocess.run([*command, requirement], check=True, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"pip didn't fetch {requirement} within {error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        told = error.stderr.strip().rpartition("\n")[2]
        raise UnavailableError(f"pip can't fetch the source of {requirement}: {told}") from error
