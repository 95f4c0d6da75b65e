"""Commands from nothing: CPU until the first token, the first step, or until a server answers; the bundled base, tiny work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from curves.curve import Curve, Point, peak_bytes

TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Hello"}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**text, max_new_tokens=1)[0, -1]))
"""
BASE = "smollm2-135m-instruct"


def ours(what: str) -> list[float | str]:
    return measured({
        "generate": ["generate", "Hello", "--max-new-tokens", "1"],
        "chat": ["chat", "--max-new-tokens", "1"],
        "train": ["train", "run.yaml"],
        "serve": ["serve", "--local", "--port", "0"],
    }[what], what)  # fmt: skip


def measured(arguments: list[str], what: str) -> list[float | str]:
    """The least of three processes."""
    found = [once([sys.executable, "-m", "trimtab", *arguments], what) for _ in range(3)]
    return [min(seconds for seconds, _ in found), max(megabytes for _, megabytes in found)]


def once(command: list[str], what: str) -> tuple[float, float]:
    """(CPU seconds, peak MB) of a process: of all of it, or until the first step is written or the server says that it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder))
        asked = subprocess.PIPE
        process = subprocess.Popen(command, cwd=folder, stdin=asked, stdout=asked, stderr=subprocess.DEVNULL, env=dict(os.environ))
        assert process.stdin is not None and process.stdout is not None
        if what == "serve":
            process.stdout.readline()
        elif what == "train":
            metrics = Path(folder) / "out" / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.01)
        else:
            process.stdin.write(b"Hello\n")
            process.stdin.close()
            _, code, used = os.wait4(process.pid, 0)
            assert code == 0, command
            return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6
        assert process.poll() is None, command
        times, peak = psutil.Process(process.pid).cpu_times(), peak_bytes(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return times.user + times.system, peak / 1e6


def write_run(folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    variants = {"v": {"method": "lora", "data": "rows", "max_steps": 500, "batch_size": 2}}
    (folder / "run.yaml").write_text(
        json.dumps({"base": BASE, "out": "out", "data": {"rows": {"train": "rows.jsonl"}}, "variants": variants})
    )


def transformers(what: str) -> list[float | str]:
    """For the sake of scale: the same first token, with nothing compared and nothing packed."""
    from trimtab.bases.locate import locate

    if what != "generate":
        return ["", ""]
    command = [sys.executable, "-c", TRANSFORMERS, str(locate(BASE, lambda line: None))]
    found = [once(command, what) for _ in range(3)]
    return [min(seconds for seconds, _ in found), max(megabytes for _, megabytes in found)]


CURVE = Curve(
    what="a command in a fresh process, the bundled base",
    grows="command",
    points=[Point(f"{name}, {until}", name) for name, until in (
        ("generate", "one token"), ("chat", "one token"), ("train", "first step"), ("serve", "ready"),
    )],
    columns=["CPU s", "peak MB"],
    ours=ours,
    peers={"transformers": transformers},
    limit=lambda point: "4 s",
)  # fmt: skip
