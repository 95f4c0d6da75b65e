"""What a folder says of how its layers are packed: `quantization_config` in its config.json, or a file beside it.

AutoGPTQ and GPTQModel write `quantize_config.json`, AutoAWQ writes `quant_config.json`. Older versions wrote nothing in config.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trimtab.bases.folder import read_header, read_json, weight_files
from trimtab.errors import BaseError

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""A file's name -> the `quant_method` that it means where it names none."""
OTHER_NAMES = {"w_bit": "bits", "q_group_size": "group_size", "method": "quant_method"}
"""What these files call some keys -> what `quantization_config` calls them."""


def quantization_settings(folder: Path) -> dict[str, Any] | None:
    """A folder's `quantization_config`; None where its base is dense. BaseError where it cannot be read."""
    found = read_json(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) and found else settings_beside(folder)


def settings_beside(folder: Path) -> dict[str, Any] | None:
    """What a file beside config.json says; None where there is none, or the folder's weights are not packed after all. BaseError where it
    cannot be read."""
    try:
        return _settings_beside(folder)
    except ValueError as error:
        raise BaseError(f"how the base in {folder} is quantised cannot be read: {error}", fix="fetch the folder anew.") from error


def _settings_beside(folder: Path) -> dict[str, Any] | None:
    for name, method in BESIDE.items():
        if os.path.lexists(folder / name):  # a folder or a link to nowhere is told of, too
            said = read_json(folder / name)
            files = [file for file in weight_files(folder) if file.is_file()]
            if files and not any(t.name.endswith(".qweight") for file in files for t in read_header(file)):
                continue
            made = {OTHER_NAMES.get(key, key): value for key, value in said.items()}
            made["quant_method"] = str(made.get("quant_method") or method).lower()
            form = made.pop("format", None) or made.get("checkpoint_format")
            key = "version" if made["quant_method"] == "awq" else "checkpoint_format"
            return made | ({key: form} if form and not made.get(key) else {})
    return None
