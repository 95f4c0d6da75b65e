"""Overload over HTTP: ten times as many clients as the server has places, each asking again and again.

    python bench/serve_overload.py            # a server of its own on 127.0.0.1, the bundled base

First as many clients as answers are computed at a time, then ten times as many. Reported: latency of the answers that were accepted, and of
the refusals, which must be quick and carry Retry-After. Clients share the cores with the server, and honour Retry-After only by a
hundredth, so that the overload lasts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time

import httpx

BODY = {"model": "smollm2-135m-instruct", "prompt": "Tell me about the history of sailing.", "max_tokens": 16, "ignore_eos": True}


async def client(http: httpx.AsyncClient, until: float, accepted: list[float], refused: list[float], wrong: list[str]) -> None:
    while time.perf_counter() < until:
        start = time.perf_counter()
        answer = await http.post("/v1/completions", json=BODY)
        seconds = time.perf_counter() - start
        if answer.status_code == 200:
            accepted.append(seconds)
        elif answer.status_code == 503 and "retry-after" in answer.headers:
            refused.append(seconds)
            await asyncio.sleep(float(answer.headers["retry-after"]) / 100)
        else:
            wrong.append(f"{answer.status_code} {answer.text[:200]}")


async def phase(url: str, clients: int, seconds: float) -> dict[str, object]:
    accepted: list[float] = []
    refused: list[float] = []
    wrong: list[str] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(client(http, until, accepted, refused, wrong) for _ in range(clients)))

    def at(values: list[float], share: float) -> float | None:
        return round(1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1) if values else None

    return {
        "clients": clients,
        "accepted": len(accepted),
        "accepted_p50_ms": at(accepted, 0.5),
        "accepted_p99_ms": at(accepted, 0.99),
        "refused": len(refused),
        "refused_p50_ms": at(refused, 0.5),
        "refused_p99_ms": at(refused, 0.99),
        "wrong": wrong[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=16, help="answers that are computed at a time; half as many may wait")
    parser.add_argument("--seconds", type=float, default=15)
    args = parser.parse_args()
    command = [sys.executable, "-m", "trimtab", "serve", "--local", "--port", "0", "--json"]
    command += ["--max-running", str(args.places), "--max-queued", str(args.places // 2)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server,
    ):
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            asyncio.run(phase(url, args.places, 3))  # warms up
            for clients in (args.places, 10 * args.places):
                print(json.dumps(asyncio.run(phase(url, clients, args.seconds))), flush=True)
        finally:
            server.terminate()
            server.wait(60)
        log.seek(0)
        lines = [json.loads(line) for line in log if line.startswith("{")]
        for status in (200, 503):  # from the first byte that the server read: without the clients' own waiting for a core
            seconds = sorted(r["seconds"] for r in lines if r.get("status") == status)
            if seconds:
                middle, most = (round(1e3 * seconds[int(q * (len(seconds) - 1))], 1) for q in (0.5, 0.99))
                print(json.dumps({"server": status, "count": len(seconds), "p50_ms": middle, "p99_ms": most}))


if __name__ == "__main__":
    main()
