"""The native kernels build wherever there is a compiler: without them everything passes too, only slower, so nothing else would tell."""

from __future__ import annotations

import os
import platform
import subprocess

import pytest

from trimtab.compiler import find_compiler
from trimtab.ops import native

COMPILER, _ = find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def test_they_build_and_load_here():
    library, why = native.load()
    assert library is not None, why


def test_what_is_copied_is_known_without_building(monkeypatch):
    assert native.copies_weights() == (native.has_tiles() or not native.attends_flat())
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    assert not native.copies_weights(), "the decode path does not run"


def test_what_is_built_under_an_open_umask_is_loaded(tmp_path, monkeypatch):
    """Ubuntu gives its users umask 002, under which compilers write files that the user's group may change."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n')
    compiler.chmod(0o755)
    before = os.umask(0o002)
    try:
        built = native._built(str(compiler))
    finally:
        os.umask(before)
    assert built.parent == tmp_path / "native" and not built.stat().st_mode & 0o022
    built.chmod(0o775)
    with pytest.raises(OSError, match="others may write it"):
        native._built(str(compiler))


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
