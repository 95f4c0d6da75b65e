"""The native kernels build wherever there is a compiler: without them everything passes too, only slower, so nothing else would tell."""

from __future__ import annotations

import platform
import subprocess

import pytest

from trimtab.ops import native

COMPILER, _ = native.find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def test_they_build_and_load_here():
    library, why = native.load()
    assert library is not None, why


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of another processor")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids"])
def test_they_build_for_other_processors(processor, tmp_path):
    """With and without wide registers, bfloat16 and tiles; and nothing that one file calls is missing in the others."""
    options = [f"-march={processor}" if f == "-march=native" else "-O1" if f == "-O3" else f for f in native.FLAGS]
    sources = sorted(str(f) for f in native.SOURCES.glob("*.cpp"))
    asked = [COMPILER, *options, "-Wl,--no-undefined", "-o", str(tmp_path / "native.so"), *sources]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
