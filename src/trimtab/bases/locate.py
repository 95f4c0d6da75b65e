"""From the name that the user gave to a folder on disk: bundled name, existing folder, .gguf file, hub id, in this order."""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.bases.bundled import BUNDLED_NAMES, prepare_bundled
from trimtab.bases.folder import check_folder
from trimtab.bases.gguf import folder_for_gguf
from trimtab.bases.progress import Progress
from trimtab.errors import BaseError, nearest
from trimtab.paths import user_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a base needs, from the top of the repository only: no pickle, no code, no second copy in a subfolder or as "consolidated" weights.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
HUB_IGNORED = ["*/*", "consolidated*", "*.bin", "*.py"]


def locate(name: str, progress: Progress, *, packed: bool = False) -> Path:
    """The folder of the base `name`, fetched or converted at first use, checked to be readable. packed: of a .gguf file, with its blocks as
    they are.

    Raises BaseError naming what was tried, the bundled names, and how to pass a folder.
    """
    if name in BUNDLED_NAMES:
        return prepare_bundled(progress)
    refuse_hopeless(name)
    path = user_path(name, BaseError, "base")
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        return folder_for_gguf(path.absolute(), progress, packed=packed)
    folder = _from_hub(name, progress)
    check_folder(folder, name=name)
    return folder


def refuse_hopeless(name: str) -> None:
    """BaseError if `name` cannot be a base, as far as this machine tells: neither network nor weights are looked at."""
    path = user_path(name, BaseError, "base")
    if name in BUNDLED_NAMES:
        return
    if path.is_dir():
        check_folder(path.absolute(), name=name)
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BaseError(f"there is no GGUF file {name!r}", fix="check the path; it is taken relative to the current folder.")
    elif path.is_file():
        raise BaseError(f"{name!r} is a file, not a base", fix="pass the folder that holds it, or a .gguf file.")
    elif not HUB_ID.fullmatch(name):
        raise _unknown(name, ["a bundled name: no", "a folder here: no", "a hub id (org/name): it is not written like one"])


def _from_hub(name: str, progress: Progress) -> Path:
    """A snapshot of a hub repository: the local copy where it is whole or where we are offline, else what the hub has."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline:
        progress(f"fetching {name} from the hub, unless it is here already")
    disable_progress_bars()
    try:
        found = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED, local_files_only=offline)
    except Exception as error:  # not found, gated, no network, disk full: each is the user's to mend, and the hub's text says which
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        where = "in the local hub cache, because HF_HUB_OFFLINE is set" if offline else "on the hub"
        raise _unknown(name, ["a bundled name: no", "a folder here: no", f"a hub id, looked up {where}: {said}"]) from error
    finally:
        enable_progress_bars()
    return Path(found)


def _unknown(name: str, tried: list[str]) -> BaseError:
    return BaseError(
        f"there is no base {name!r}{nearest(name.lower(), BUNDLED_NAMES)}",
        problems=tried,
        fix=f"use a bundled name ({', '.join(BUNDLED_NAMES)}), the path of a folder with config.json, safetensors and a tokenizer "
        "(for example ./my-model), a .gguf file, or a hub id such as org/name.",
    )
