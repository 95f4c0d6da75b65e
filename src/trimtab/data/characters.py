"""What no text that is trained on may hold."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
"""Controls that no text has. Tab and the breaks of lines and pages (U+0009 to U+000D) are text."""


def bad_character(text: str) -> str | None:
    """What keeps `text` from being trained on, or None. Bytes that were not UTF-8 arrive as surrogates (PEP 383) and are named as bytes."""
    if (control := _CONTROL.search(text)) is not None:
        return f"control character U+{ord(control[0]):04X}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"not Unicode: lone surrogate U+{code:04X}"
    return None
