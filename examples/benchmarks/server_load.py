"""A server under load: how much many clients get done together, and what is left when half of them have gone away.

Clients ask about pictures, each request about one of `--pictures`, and stream the answers. Three rounds on one server:
`alone`, one client after the other; `together`, `--clients` at once; `leaving`, as many at once for `--requests`, of
which each second one hangs up after a few tokens. Throughput is that of tokens that arrived. At the end nothing may be
lost (an answer without its end), nothing may run on (prompts of the server), and every request is accounted for, as
complete or as left. The memory of the server is read after a tenth of the requests, and at the end.

    python examples/benchmarks/server_load.py --requests 2000 --out docs/results/server_load.json
"""

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as PILImage

QUESTIONS = ("What is in the picture?", "What colour is it?", "How many are there?", "Describe it in one sentence.")


@dataclass
class Counts:
    complete: int = 0
    left: int = 0
    refused: int = 0
    """429: the queue was full; asked again."""
    lost: int = 0
    tokens: int = 0


@contextmanager
def server(model: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """Address and process id of a server that is ready."""
    command = [sys.executable, "-m", "mm_gpt", "serve", "--model", model, "--name", "model", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"is served at (\S+)/v1", line):
                yield found[1], process.pid
                return
        raise SystemExit(f"the server has ended with code {process.wait()}")
    finally:
        process.terminate()
        process.wait()


def pictures(count: int) -> list[str]:
    """Data URLs of photos' size, each of other blocks."""
    urls = []
    for blocks in np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        PILImage.fromarray(blocks).resize((640, 480), PILImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls


def body(number: int, urls: list[str], tokens: int, without: list[int]) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": urls[number % len(urls)]}}
    words = {"type": "text", "text": QUESTIONS[number // len(urls) % len(QUESTIONS)]}
    return {
        "model": "model",
        "messages": [{"role": "user", "content": [picture, words]}],
        "max_completion_tokens": tokens,
        "logit_bias": {str(id): -100 for id in without},
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(client: httpx.AsyncClient, request: dict[str, Any], leave_after: int | None, counts: Counts) -> None:
    """One request. `leave_after` events the client hangs up, unless the answer is complete before."""
    while True:
        events = 0
        async with client.stream("POST", "/v1/chat/completions", json=request) as stream:
            if stream.status_code == 429:
                counts.refused += 1
                await stream.aread()
                await asyncio.sleep(0.1)
                continue
            ended = False
            async for line in stream.aiter_lines():
                if not line.startswith("data: "):
                    continue
                events += 1
                if line == "data: [DONE]":
                    ended = True
                elif (used := json.loads(line[6:]).get("usage")) is not None:
                    counts.tokens += used["completion_tokens"]
                if leave_after is not None and events > leave_after and not ended:
                    counts.left += 1
                    return
            counts.complete += ended
            counts.lost += not ended
            return


async def run(
    address: str,
    make: Callable[[int], dict[str, Any]],
    count: int,
    clients: int,
    leaving: bool,
    at: Callable[[int], None],
) -> tuple[Counts, float]:
    """What came of `count` requests by so many clients at once, and seconds. `at(number)` is told of each request."""
    counts, numbers, rng = Counts(), iter(range(count)), random.Random(0)
    start = time.perf_counter()

    async def work() -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
            for number in numbers:
                at(number)
                leave_after = rng.randrange(8) if leaving and number % 2 else None
                await ask(client, make(number), leave_after, counts)

    await asyncio.gather(*(work() for _ in range(clients)))
    return counts, time.perf_counter() - start


def metrics(address: str) -> dict[str, float]:
    lines = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def counted(values: dict[str, float]) -> list[float]:
    """Requests that ended well, and those whose client had left: some leave when the last byte is on its way."""
    name = 'mm_gpt_requests_total{{endpoint="chat.completions",status="{}"}}'
    return [values.get(name.format(status), 0) for status in (200, 499)]


def memory_mb(process: int) -> float:
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000, help="of the round in which half of them leave")
    parser.add_argument("--compared", type=int, default=48, help="requests of each of the other rounds")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument(
        "--without",
        type=int,
        nargs="*",
        default=[],
        help="ids that never come: without the model's end marks, all answers are as long as --tokens",
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args, options = parser.parse_known_args()  # what is left are options of the server
    urls = pictures(args.pictures)
    rounds, memory = [], {}
    with server(args.model, options) as (address, process):

        def make(number: int) -> dict[str, Any]:
            return body(number, urls, args.tokens, args.without)

        def at(number: int) -> None:
            if number == args.requests // 10:
                memory["after a tenth"] = memory_mb(process)

        asyncio.run(run(address, make, args.pictures, args.clients, False, lambda _: None))  # warms up
        for name, count, clients in (("alone", args.compared, 1), ("together", args.compared, args.clients)):
            counts, seconds = asyncio.run(run(address, make, count, clients, False, lambda _: None))
            rounds.append({"round": name, "seconds": round(seconds, 2), **vars(counts)})
            print(f"{name:9} {counts.tokens / seconds:7.1f} tokens/s  {vars(counts)}")
        before = metrics(address)
        counts, seconds = asyncio.run(run(address, make, args.requests, args.clients, True, at))
        rounds.append({"round": "leaving", "seconds": round(seconds, 2), **vars(counts)})
        print(f"{'leaving':9} {counts.tokens / seconds:7.1f} tokens/s  {vars(counts)}")
        end = time.monotonic() + 10
        while (after := metrics(address))["mm_gpt_prompts_running"] and time.monotonic() < end:
            time.sleep(0.05)
        memory["at the end"] = memory_mb(process)
    alone, together = (row["tokens"] / row["seconds"] for row in rounds[:2])
    result = {
        "what": "tokens per second of one client at a time and of several; what is left after half of them went away",
        "model": args.model,
        "clients": args.clients,
        "tokens": args.tokens,
        "rounds": rounds,
        "throughput_ratio": round(together / alone, 2),
        "requests_unaccounted": args.requests - sum(counted(after)) + sum(counted(before)),
        "aborts": after["mm_gpt_aborts_total"] - before["mm_gpt_aborts_total"],
        "prompts_left_running": after["mm_gpt_prompts_running"] + after["mm_gpt_prompts_waiting"],
        "memory_mb": {name: round(value) for name, value in memory.items()},
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
