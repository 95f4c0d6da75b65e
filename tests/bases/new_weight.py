"""The weight format that CONTRIBUTING.md adds: its two blocks of code as modules, in the registry for as long as a test runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from trimtab.bases.weights import FORMATS, Weight

ROOT = Path(__file__).parent.parent.parent
FILES = {"trimtab.ops.int8_rows": "ops/int8_rows.py", "trimtab.bases.weights.int8_rows": "bases/weights/int8_rows.py"}
"""The modules of the example, in the order of its text, and the files that they would be."""
NAME = "int8-rows"


def sources() -> dict[str, str]:
    """module -> its source."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a weight format\n")
    return dict(zip(FILES, re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL), strict=True))


@contextmanager
def registered() -> Iterator[type[Weight]]:
    """The format, among the others."""
    try:
        for name, source in sources().items():
            sys.modules[name] = ModuleType(name)
            exec(compile(source, FILES[name], "exec"), vars(sys.modules[name]))
        yield FORMATS[NAME]
    finally:
        FORMATS.pop(NAME, None)
        for name in FILES:
            sys.modules.pop(name, None)
