"""`trimtab completion`: the scripts are those of the shells, and what they ask is answered without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab.cli import COMMANDS, main
from trimtab.cli.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0 and f"_TRIMTAB_COMPLETE={shell}_complete" in done.stdout


def test_another_shell_is_a_mistake() -> None:
    done = CliRunner().invoke(main, ["completion", "tcsh"])
    assert done.exit_code == 2 and "'bash', 'zsh', 'fish'" in done.output


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """A real bash with the script, and a `trimtab` that would fail if it loaded torch."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    program = tmp_path / "trimtab"
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'trimtab'; from trimtab.__main__ import run; run()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _trimtab_completion trimtab; echo ${{COMPREPLY[@]}}"
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert set(completed("trimtab", "''")) == set(COMMANDS)
    assert completed("trimtab", "adapters", "pu") == ["publish", "push", "pull"]
    assert completed("trimtab", "train", "--ext") == ["--extend"]
