"""The process in which grammars are compiled and followed: `python -m trimtab.serve.grammar_process`, talked to by `grammars.py`.

Messages come on standard input and are answered in order on standard output. A message that takes too much processor time or memory ends
the process: the limits are the system's, which hold whatever the library is doing. The process takes the cores that the server leaves.
Both sides' frames are built here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from array import array
from pathlib import Path
from typing import BinaryIO

from trimtab.errors import TrimtabError
from trimtab.memory import release_freed
from trimtab.serve.grammar import Compiler, Matcher

START_S = 60.0
"""Processor seconds of the start."""
HEAD = struct.Struct("<cIII")
"""kind of message, id of the matcher, tokens that follow, bytes that follow them."""
REPLY = struct.Struct("<cII")
"""status (b"+": going on, b"=": done, b"-": no token is possible any more), id, bytes that follow: a mask, or what is wrong."""


def message(kind: bytes, matcher: int, tokens: array[int], data: bytes = b"") -> bytes:
    """b"o": open a matcher for the grammar in data (JSON: [kind, text]), after these tokens. b"a": advance by tokens. b"c": close; has no
    answer."""
    return HEAD.pack(kind, matcher, len(tokens), len(data)) + tokens.tobytes() + data


def main() -> None:
    inp, out = sys.stdin.buffer, sys.stdout.buffer
    matchers: dict[int, Matcher] = {}
    signal.setitimer(signal.ITIMER_PROF, START_S)  # its signal ends the process
    said = json.loads(_read(inp, *struct.unpack("<I", _read(inp, 4))))
    try:
        compiler = Compiler(said["tokenizer"], said["vocab_size"], said["stop_ids"])
    except Exception as error:  # told under a number that no matcher has
        told = f"{type(error).__name__}: {error}"[:500].encode()
        out.write(REPLY.pack(b"-", 0, len(told)) + told)
        raise SystemExit(1) from None
    room = said["room_bytes"]
    limits = {b"o": said["open_s"], b"a": said["mask_s"]}
    del said  # the tokenizer's text is large
    release_freed()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * os.sysconf("SC_PAGE_SIZE") + room
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, 0)
    while head := inp.read(HEAD.size):
        kind, number, count, size = HEAD.unpack(head)
        tokens = array("I", _read(inp, 4 * count))
        data = _read(inp, size)
        if kind == b"c":
            matchers.pop(number, None)
            if not matchers:
                release_freed()
            continue
        signal.setitimer(signal.ITIMER_PROF, limits[kind])
        try:
            if kind == b"o":
                matchers[number] = compiler.matcher(*json.loads(data))
            status, answer = _advance(matchers[number], tokens)
        except TrimtabError as error:
            status, answer = b"-", error.message.encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(REPLY.pack(status, number, len(answer)) + answer)
        out.flush()


def _advance(matcher: Matcher, tokens: array[int]) -> tuple[bytes, bytes]:
    if not all(matcher.advance(t) for t in tokens):
        return b"-", matcher.error.encode()
    if matcher.done:
        return b"=", b""
    mask = matcher.mask
    return (b"-", matcher.error.encode()) if matcher.error else (b"+", mask)


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise SystemExit(0)  # the other side has gone
    return data


if __name__ == "__main__":
    main()
