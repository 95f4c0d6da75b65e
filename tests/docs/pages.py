"""The pages of docs/ as programs: their blocks of code in order, made into one shell script that a test runs.

A block with a title is a file to be written. Blocks of bash and Python are run. A block whose command is `trimtab serve` runs beside
the others from there on. An HTML comment before a block, `<!-- not run: why -->`, says that it is not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = ("tutorials", "how-to", "reference", "explanation")
"""Those whose blocks are run, or checked, one by one. The pages of docs/ itself are older: their commands are looked up."""
SHOWN = ("text", "csv", "nginx")
"""What a block may hold that nobody types."""

BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^```(\w*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^ *```\w", re.MULTILINE)
PORT = 8000
"""Which the pages name."""


@dataclass(frozen=True)
class Block:
    """One block of code. not_run: the reason why it is not, if it is not."""

    language: str
    title: str
    text: str
    not_run: str | None

    @property
    def serves(self) -> bool:
        return self.language == "bash" and self.text.startswith("trimtab serve")


def blocks(page: Path) -> list[Block]:
    """The blocks of a page. AssertionError where one is indented or has no language, so that it would not be seen."""
    text = page.read_text(encoding="utf-8")
    found = [Block(m[2], m[3] or "", m[4], m[1]) for m in BLOCK.finditer(text)]
    assert len(found) == len(ANY_BLOCK.findall(text)) and all(b.language for b in found), f"{page}: a block is written in another way"
    return found


def pages() -> list[Path]:
    """The pages whose blocks are run or checked."""
    return [DOCS / "index.md", *(p for folder in FOLDERS for p in sorted((DOCS / folder).glob("*.md")))]


def script(found: Iterable[Block], port: int) -> str:
    """A page's blocks as one program of bash, which ends where a command fails. The server, if there is one, is at `port`."""
    lines = ["set -euo pipefail", "trap 'code=$?; jobs -p | xargs -r kill; wait; exit $code' EXIT"]
    for n, block in enumerate(found):
        text = block.text.replace(f":{PORT}", f":{port}")
        if block.not_run is not None or block.language in SHOWN:
            continue
        if block.title:
            lines.append(f"cat > {shlex.quote(block.title)} <<'END_OF_FILE'\n{text}END_OF_FILE")
        elif block.serves:
            command = text.strip().replace(f"--port {PORT}", "")
            lines.append(f"{command} --port {port} > serve-{n}.log 2>&1 &")
            lives = f"kill -0 $! || {{ cat serve-{n}.log; exit 1; }}"
            lines.append(f"until curl -s -o /dev/null http://127.0.0.1:{port}/readyz; do {lives}; sleep 0.1; done")
        elif block.language == "bash":
            lines.append(text)
        elif block.language == "python":
            lines.append(f"python - <<'END_OF_FILE'\n{text}END_OF_FILE")
    return "\n".join(lines) + "\n"
