"""`trimtab` as the pages' scripts call it: the real command in a process of its own, on a tiny base, with runs that are cut short.

A process imports everything once (`python -m tests.docs.command SOCKET`) and forks for each call, since imports would take most of the time
of these tests. `CLIENT` is the program that a script calls: it hands over its files, folder and environment, and ends as the call ends.

`TEST_BASE` is the base that takes the place of the bundled one, also where the pages name none. `TEST_STEPS` is the number of steps after
which a run with `defaults` ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path

import click

from trimtab.__main__ import run
from trimtab.cli import COMMANDS, main

CLIENT = """
import json, os, signal, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ["TRIMTAB_CALLS"])
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(s, [len(call).to_bytes(4, "big")], [0, 1, 2])
s.sendall(call)
pid = int.from_bytes(s.recv(4), "big")
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
sys.exit(int.from_bytes(s.recv(1), "big"))
"""
HEAVY = ("trimtab.train.loop", "trimtab.train.check", "trimtab.tryout", "trimtab.serve.engine", "trimtab.http.server", "trimtab.cost.plan")


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments, with the base and the number of steps of the environment."""
    command: click.Command = main
    context = click.Context(main, info_name="trimtab")
    rest = list(arguments)
    while isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest.pop(0))
        if found is None:
            return arguments
        command = found
    added = []
    base, steps = os.environ.get("TEST_BASE"), os.environ.get("TEST_STEPS")
    options = {o for p in command.params for o in p.opts}
    if base and "--base" in options and "--base" not in arguments and command.name != "init":
        added += ["--base", base]
    if steps and command.name == "train" and "defaults:" in Path(rest[0]).read_text(encoding="utf-8"):
        added += ["--set", f"defaults.max_steps={steps}"]
    return [*arguments, *added]


def called(arguments: list[str], files: list[int]) -> None:
    """One call, in the process that was forked for it."""
    for n, file in enumerate(files):
        os.dup2(file, n)
    sys.argv = ["trimtab", *rewritten(arguments)]
    code = 1
    try:
        run()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def listen(path: str) -> None:
    """Take calls until the process is ended."""
    for name in [*(f"trimtab.cli.{c.replace('-', '_')}" for c in COMMANDS), *HEAVY]:
        import_module(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    server.settimeout(0.02)
    running: dict[int, socket.socket] = {}
    while True:
        try:
            caller, _ = server.accept()
        except TimeoutError:
            caller = None
        if caller is not None:
            caller.setblocking(True)
            size, files, _, _ = socket.recv_fds(caller, 4, 3)
            call = b""
            while len(call) < int.from_bytes(size, "big"):
                call += caller.recv(2**16)
            arguments, folder, environment = json.loads(call)
            pid = os.fork()
            if pid == 0:
                server.close()
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                called(arguments, files)
            for file in files:
                os.close(file)
            caller.sendall(pid.to_bytes(4, "big"))
            running[pid] = caller
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                with running.pop(pid) as waiting:
                    waiting.sendall((code if code >= 0 else 128 - code).to_bytes(1, "big"))


if __name__ == "__main__":
    listen(sys.argv[1])
