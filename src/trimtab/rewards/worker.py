"""The process that one reward runs in: `python -m trimtab.rewards.worker FD`, talked to by `asked.py` over a socket.

A line of JSON comes in, a line goes out: first the reward itself, then calls. What a user's function prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    _end_with_parent()
    os.dup2(2, 1)
    own = os.getpid()
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as lines:
        call: Callable[[dict[str, Any]], Any] | str = "nothing to call"
        for number, line in enumerate(lines):
            said = json.loads(line)
            reply: dict[str, Any] = {}
            try:
                if number == 0:
                    call = _function(said) if said["file"] else _builtin(said)
                else:
                    assert callable(call)
                    reply = {"scores": [None if s is None else float(s) for s in call(said)]}
            except Exception as error:  # told for the first call, and for each: a reward may fail without ending the run
                reply = {"error": str(error) if isinstance(error, NotLoaded) else _told(error)}
                if number == 0:
                    call = _failing(reply["error"])
            if os.getpid() != own:  # a copy of this process that the function has made: two would answer each call
                os._exit(0)
            if number == 0:
                continue
            lines.write(json.dumps(reply).encode() + b"\n")  # NaN is no JSON, but Python reads it
            lines.flush()


def _end_with_parent() -> None:
    """If the training process is gone, nobody waits for this one, whatever its function does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _told(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:
        return type(error).__name__


class NotLoaded(Exception):
    """The reward cannot be called; the text says why."""


def _failing(message: str) -> Callable[[dict[str, Any]], Any]:
    def fail(_: dict[str, Any]) -> Any:
        raise NotLoaded(message)

    return fail


def _builtin(said: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    from trimtab.rewards.builtin import REWARDS

    function, options = REWARDS[said["function"]], said["options"]
    taken = inspect.signature(function).parameters

    def call(asked: dict[str, Any]) -> Any:
        given = {"references": asked["references"], "calls": asked["calls"]}
        return function(asked["texts"], **{k: v for k, v in given.items() if k in taken}, **options)

    return call


def _function(said: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """A user's function, called as TRL's trainers call it."""
    file = Path(said["file"])
    sys.path.insert(0, str(file.parent))
    name = f"reward_{file.stem}"  # not that of a module that Python has
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    function = getattr(module, said["function"])

    def call(asked: dict[str, Any]) -> Any:
        own = {
            "prompts": asked["prompts"],
            "completions": asked["completions"],
            "completion_ids": asked["completion_ids"],
            "trainer_state": SimpleNamespace(global_step=asked["step"]),
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
        }
        result = function(**asked["columns"], **own)
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    return call


if __name__ == "__main__":
    main()
