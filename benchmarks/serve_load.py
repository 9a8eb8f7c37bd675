"""Measure `otdrg serve` with many users at once: failed requests, the time of a report, and memory.

    python benchmarks/serve_load.py checkpoints/otdrg-iu-xray --users 20 --seconds 60

Each user is OpenAI's client. It asks for the reports of phantoms of two views, one after another, every second one as a
stream, until the time is over, and repeats a request that the full queue refused, as the client does by default. Prints
a Markdown table of the requests, the reports per second, and the memory of the server: before, in each quarter of the
time, at its peak, and at the end. Fails if a request fails, or if two texts of a phantom, streamed or not, differ.
Server and users run on this machine (127.0.0.1).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import psutil
from demo_load import Memory, make_model
from otdrg.studies.phantom import make_phantom

#: Phantoms that users ask about, in turn.
PHANTOMS = 8
KINDS = ("whole", "stream")
#: Name of the model in requests.
MODEL = "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a run or a model (default: a tiny one, random weights)")
    parser.add_argument("--users", type=int, default=20, help="number of users at once")
    parser.add_argument("--seconds", type=float, default=60, help="time during which users ask")
    parser.add_argument("--side", type=int, default=1024, help="side of a view in pixels")
    parser.add_argument("--serve", default="--candidates 1", help="further arguments of otdrg serve")
    options = parser.parse_args()
    studies = [make_study(index, options.side) for index in range(PHANTOMS)]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder) / "model")
        with serving(model, options.serve.split()) as (process, address), Memory(process) as memory:
            load = Load(address, studies)
            asyncio.run(load.run(1, 0))  # loads what the first report needs
            memory.mark()
            load.forget()
            asyncio.run(load.run(options.users, options.seconds))
            memory.mark()
    print(load.table())
    print(memory.summary())
    failed, differing = sum(load.failed.values()), load.differing()
    if failed or differing:
        raise SystemExit(f"{failed} requests failed, {differing} phantoms have several texts")


def make_study(index: int, side: int) -> list[dict]:
    """The views of a phantom as parts of a message."""
    parts = []
    for view in make_phantom(0, index, side, ("frontal", "lateral")).images:
        data = io.BytesIO()
        view.save(data, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


@contextlib.contextmanager
def serving(model: str, arguments: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """Start `otdrg serve` in another process; yields the process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "otdrg.cli", "serve", model, "--port", str(port), "--name", MODEL, *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not server.stdout.readline():
            raise SystemExit("the server did not start")
        yield psutil.Process(server.pid), f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


class Load:
    """Users of the server, the times of their requests, and what failed.

    Args:
        address: of the API.
        studies: messages' parts.
    """

    def __init__(self, address: str, studies: list[list[dict]]):
        self.address, self.studies = address, studies
        self.forget()

    def forget(self) -> None:
        """Reset all counts."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.first: list[float] = []
        self.failed: dict[str, int] = defaultdict(int)
        self.texts: dict[int, set[str]] = defaultdict(set)
        self.elapsed = 0.0

    async def run(self, users: int, seconds: float) -> None:
        """Run users until the time is over; each completes at least one request of both kinds."""
        start = time.monotonic()
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=self.address, api_key="none", http_client=http, timeout=300, max_retries=8
        ) as client:
            await asyncio.gather(*(self._user(client, user, start + seconds) for user in range(users)))
        self.elapsed = time.monotonic() - start

    def differing(self) -> int:
        """The number of phantoms whose texts differ."""
        return sum(len(texts) > 1 for texts in self.texts.values())

    def table(self) -> str:
        """The requests as a Markdown table, and the reports per second."""
        lines = ["| request | answered | failed | p50, s | p95, s | most, s |", "|---|---|---|---|---|---|"]
        for kind in KINDS:
            seconds = self.seconds[kind] or [np.nan]
            p50, p95 = np.percentile(seconds, (50, 95))
            counts = f"{len(self.seconds[kind])} | {self.failed[kind]}"
            lines.append(f"| {kind} | {counts} | {p50:.2f} | {p95:.2f} | {max(seconds):.2f} |")
        total = sum(map(len, self.seconds.values()))
        first = np.median(self.first) if self.first else np.nan
        lines += ["", f"{total} reports in {self.elapsed:.1f} s: {total / self.elapsed:.2f} per second"]
        lines += [f"first word of a stream after {first:.2f} s (median)"]
        return "\n".join(lines)

    async def _user(self, client: openai.AsyncOpenAI, user: int, end: float) -> None:
        turn = user
        while turn < user + 2 or time.monotonic() < end:
            await self._ask(client, turn % PHANTOMS, KINDS[(turn // PHANTOMS + turn) % 2])
            turn += 1

    async def _ask(self, client: openai.AsyncOpenAI, study: int, kind: str) -> None:
        start = time.monotonic()
        messages = [{"role": "user", "content": self.studies[study]}]
        try:
            answer = await client.chat.completions.create(model=MODEL, messages=messages, stream=kind == "stream")
            if kind == "whole":
                text = answer.choices[0].message.content
            else:
                text = ""
                async for chunk in answer:
                    words = chunk.choices[0].delta.content or ""
                    if words and not text:
                        self.first.append(time.monotonic() - start)
                    text += words
        except openai.OpenAIError as error:
            self.failed[kind] += 1
            print(json.dumps(f"{kind}: {error}"), file=sys.stderr)
            return
        self.texts[study].add(text)
        self.seconds[kind].append(time.monotonic() - start)


if __name__ == "__main__":
    main()
