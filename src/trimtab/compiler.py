"""The compiler that builds the native kernels (`ops.native`). Here, and not there, since it is asked for before torch is imported."""

from __future__ import annotations

import os


def find_compiler() -> tuple[str | None, str]:
    """(the compiler that builds the kernels, "") or (None, why they are not built)."""
    import shutil  # `import trimtab` takes almost no time

    if os.environ.get("TRIMTAB_NATIVE") == "0":
        return None, "TRIMTAB_NATIVE=0"
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return found, "" if found else "no C++ compiler (g++, clang++) is installed"
