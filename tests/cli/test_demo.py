"""What `trimtab demo` shows at its end."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tests.python.test_shown import summary
from trimtab.cli.demo import print_report


def test_the_demo_says_what_was_gained_with_the_measure_of_each_desk() -> None:
    desks = {
        "support": ({"exact_match": 0.0, "token_f1": 8.1, "loss": 5.0}, {"exact_match": 0.0, "token_f1": 46.2, "loss": 1.2}),
        "legal": ({"exact_match": 0.0, "token_f1": 3.0, "loss": 7.0}, {"exact_match": 97.5, "token_f1": 98.0, "loss": 0.1}),
    }
    told = {"base_fingerprint": {"before": "sha256:" + "a" * 64, "after": "sha256:" + "a" * 64}, "tokens": 12345, "tokens_per_s": 900.5}
    run = summary(desks, measures={"support": "token_f1", "legal": "exact_match"}, **told)
    said = [{"desk": "support", "question": "Who?", "who": who, "answer": "[red]me"} for who in ("base", "support")]
    out = io.StringIO()
    print_report(Console(file=out, width=140), run, said, Path("runs/demo"), 75.0)
    shown = " ".join(out.getvalue().split())
    assert "│ – │ 8.1→46.2 │" in shown and "│ 0.0→97.5 │ – │" in shown
    assert "F1 of support went from 8 to 46% and exact match of legal went from 0 to 98%; that took 61 s" in shown
    assert "[red]me" in shown and "= sha256:aaaa" in shown and "runs/demo/adapters/support-lora" in shown
    assert "its own desk. What" in shown  # a file or a pipe has no bold type
    out = io.StringIO()
    print_report(Console(file=out, width=140, force_terminal=True, color_system="standard"), run, said, Path("runs/demo"), 75.0)
    assert "\x1b[1msupport\x1b[0m" in out.getvalue() and "its own desk (bold). What" in " ".join(out.getvalue().split())
