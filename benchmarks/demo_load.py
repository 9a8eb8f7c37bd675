"""Measure `otdrg demo` with many users at once: refused requests, the time of each step, and memory.

    python benchmarks/demo_load.py --users 20 --seconds 60

Each user does what a browser does: open the page, upload a view, write its report, show a heatmap, write again from
changed states, and clear the form, until the time is over. Prints a Markdown table of the steps, and the memory of the
server: before, in each quarter of the time, at its peak, and at the end. The default model is the preset `tiny`
with random weights. Server and users run on this machine (127.0.0.1).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
from otdrg import FINDINGS, OTDRGConfig, OTDRGForReportGeneration, OTDRGProcessor
from PIL import Image

#: Steps of a user, in order. Steps that write a report wait for the model, which serves one at a time.
STEPS = ("upload", "add_views", "show", "write_report", "show_heatmap", "write_again", "start_anew")

_TEXTS = ("The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax.",)
_STATES = ["negative" if name != "no_finding" else "positive" for name in FINDINGS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a run or a model (default: a tiny one with random weights)")
    parser.add_argument("--users", type=int, default=20, help="number of users at once")
    parser.add_argument("--seconds", type=float, default=60, help="time during which users start new studies")
    parser.add_argument("--side", type=int, default=2000, help="side of a view in pixels")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="tokens of a report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder) / "model")
        with serving(model, options.max_new_tokens) as (process, address), Memory(process) as memory:
            load = Load(address)
            asyncio.run(load.run(1, 0, make_view(options.side)))  # loads what the first report needs
            memory.mark()
            load.forget()
            asyncio.run(load.run(options.users, options.seconds, make_view(options.side)))
            memory.mark()
    print(load.table())
    print(memory.summary())


def make_model(folder: Path) -> str:
    """Save the preset `tiny` with random weights."""
    config = OTDRGConfig.from_preset("tiny")
    processor = OTDRGProcessor.from_texts(_TEXTS, config=config, vocab_size=400)
    OTDRGForReportGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_view(side: int) -> bytes:
    """A PNG of noise on a slope."""
    pixels = np.linspace(0, 160, side)[:, None] + np.random.default_rng(0).integers(0, 90, (side, side))
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG", compress_level=1)
    return data.getvalue()


@contextlib.contextmanager
def serving(model: str, max_new_tokens: int) -> Iterator[tuple[psutil.Process, str]]:
    """Start `otdrg demo` in another process; yields the process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--max-new-tokens", str(max_new_tokens)]
    server = subprocess.Popen(
        [sys.executable, "-m", "otdrg.cli", "demo", model, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        address = server.stdout.readline().strip()
        if not address:
            raise SystemExit("the demo did not start")
        yield psutil.Process(server.pid), address
    finally:
        server.terminate()
        server.wait(60)


class Memory:
    """The resident memory of a process, sampled ten times a second."""

    def __init__(self, process: psutil.Process):
        self.process, self.samples, self.marks = process, [], []
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._sampler.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._sampler.join()

    def mark(self) -> None:
        """Mark the start or the end of the measurement."""
        self.marks.append(len(self.samples))

    def summary(self) -> str:
        """The memory between the two marks, in MiB."""
        begin, end = self.marks
        samples = [sample / 2**20 for sample in self.samples[begin:end]]
        quarters = np.array_split(samples, 4)
        means = ", ".join(f"{quarter.mean():.0f}" for quarter in quarters)
        before, peak, end = self.samples[begin - 1] / 2**20, max(samples), samples[-1]
        return (
            f"\nmemory in MiB: {before:.0f} before, {means} in the quarters, {peak:.0f} at most, {end:.0f} at the end"
        )

    def _sample(self) -> None:
        while not self._stopped.wait(0.1):
            with contextlib.suppress(psutil.Error):
                self.samples.append(self.process.memory_info().rss)


class Load:
    """Users of the demo, the times of their steps, and the refused steps.

    Args:
        address: address of the demo, such as "http://127.0.0.1:7860/".
    """

    def __init__(self, address: str):
        self.address = f"{address.rstrip('/')}/gradio_api"
        config = httpx.get(f"{address.rstrip('/')}/config").raise_for_status().json()
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}
        self.forget()

    def forget(self) -> None:
        """Reset all counts."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.refused: dict[str, list[str]] = defaultdict(list)

    async def run(self, users: int, seconds: float, view: bytes) -> None:
        """Run users until the time is over. Each completes at least one study, and the study it has started."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._user(client, end, view) for _ in range(users)))

    def table(self) -> str:
        """The steps as a Markdown table."""
        lines = ["| step | requests | refused | p50, s | p95, s |", "|---|---|---|---|---|"]
        for step in STEPS:
            seconds, refused = self.seconds[step], self.refused[step]
            p50, p95 = np.percentile(seconds, (50, 95)) if seconds else (np.nan, np.nan)
            lines.append(f"| {step} | {len(seconds) + len(refused)} | {len(refused)} | {p50:.2f} | {p95:.2f} |")
        reasons = {reason for step in STEPS for reason in self.refused[step]}
        return "\n".join([*lines, *sorted(reasons)])

    async def _user(self, client: httpx.AsyncClient, end: float, view: bytes) -> None:
        while True:
            session = secrets.token_hex(8)
            # An open page holds this request open.
            async with client.stream("GET", f"{self.address}/heartbeat/{session}"):
                await self._study(client, session, view)
            if time.monotonic() >= end:
                return

    async def _study(self, client: httpx.AsyncClient, session: str, view: bytes) -> None:
        path = await self._step("upload", self._upload(client, view))
        if path is None:
            return
        file = {"path": path, "orig_name": "frontal.png", "meta": {"_type": "gradio.FileData"}}
        for step, *inputs in (
            ("add_views", [file]),
            ("show",),
            ("write_report", "Cough."),
            ("show_heatmap", "edema"),
            ("write_again", "Cough.", "edema", *_STATES),
            ("start_anew",),
        ):
            # The last input of each event is the session's state, which stays on the server.
            request = {"data": [*inputs, None], "fn_index": self.events[step], "session_hash": session}
            waits = step.startswith("write")
            await self._step(step, self._queued(client, request) if waits else self._quick(client, step, request))

    async def _step(self, name: str, work: Awaitable[str]) -> str | None:
        start = time.monotonic()
        try:
            answer = await work
        except (httpx.HTTPError, RefusedError) as error:
            self.refused[name].append(f"{name}: {error or type(error).__name__}")
            return None
        self.seconds[name].append(time.monotonic() - start)
        return answer

    async def _upload(self, client: httpx.AsyncClient, view: bytes) -> str:
        answer = await client.post(f"{self.address}/upload", files={"files": ("frontal.png", view, "image/png")})
        return _accepted(answer).json()[0]

    async def _quick(self, client: httpx.AsyncClient, step: str, request: dict) -> str:
        return _accepted(await client.post(f"{self.address}/run/{step}", json=request)).text

    async def _queued(self, client: httpx.AsyncClient, request: dict) -> str:
        _accepted(await client.post(f"{self.address}/queue/join", json=request))
        parameters = {"session_hash": request["session_hash"]}
        async with client.stream("GET", f"{self.address}/queue/data", params=parameters) as events:
            async for line in events.aiter_lines():
                _check(line)
                if '"process_completed"' in line:
                    if '"success":true' not in line:
                        raise RefusedError(line[:200])
                    return line
        raise RefusedError("the answer ended early")


class RefusedError(Exception):
    """The server refused a request."""


def _accepted(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise RefusedError(f"{answer.status_code}: {answer.text[:200]}")
    _check(answer.text)
    return answer


def _check(answer: str) -> None:
    """Raise the error that the page would show."""
    if r"role=\"alert\"" in answer:
        raise RefusedError(answer.partition(r"role=\"alert\">")[2].partition("</p>")[0])


if __name__ == "__main__":
    main()
