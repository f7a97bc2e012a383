"""Starts the server, loads the model while it answers 503, and ends it in good order."""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mm_gpt.errors import MMGPTError, not_installed

try:  # before torch, which takes seconds
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn
except ImportError as missing:
    raise MMGPTError(not_installed("The server's Starlette, uvicorn or prometheus-client", "serve")) from missing

from mm_gpt.inference.assistant import Assistant
from mm_gpt.serving.server.app import App
from mm_gpt.serving.server.config import ServerConfig
from mm_gpt.serving.server.service import Service

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = 75
AFTER_GRACE_S = 5
"""For clients to be told that their answers end here, and for those who have not sent their requests yet."""
HEADER_BYTES = 64 * 1024
CONNECTIONS_BEHIND = 2048


class Server(uvicorn.Server):
    """Ends with the first SIGTERM or Ctrl-C when all answers are complete, with the second at once."""

    def __init__(self, config: uvicorn.Config, *, grace_s: float, cut_off: Callable[[], None]):
        """`cut_off` ends all answers, and is called in a thread when what runs has not ended within `grace_s`."""
        super().__init__(config)
        self.grace_s, self.cut_off = grace_s, cut_off
        config.timeout_graceful_shutdown = round(grace_s) + AFTER_GRACE_S

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.grace_s, loop.run_in_executor, None, self.cut_off)
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        print("mm-gpt: stopping when all answers are complete (again to stop at once)", file=sys.stderr, flush=True)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether to log it: that a request was cut off at the very end is no fault."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server; port 0 takes a free one. Raises MMGPTError when nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=CONNECTIONS_BEHIND)
    except (OSError, OverflowError) as error:
        raise MMGPTError(f"cannot listen on {host} port {port}: {error}") from error
    # Connections inherit it. Without it each small event waits 40 ms for the client to confirm the one before.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def serve(load: Callable[[], Assistant], name: str, config: ServerConfig, sock: socket.socket) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Raises what `load` raises.

    `load` runs in a thread of its own: meanwhile the server answers that it is loading."""
    app = App(config)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=HEADER_BYTES,
        ),
        grace_s=config.grace_s,
        cut_off=app.close,
    )
    failures: list[BaseException] = []

    def load_model() -> None:
        try:
            app.service = Service.of(load(), name, config)
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"mm-gpt: {name} is served at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=load_model, name="load", daemon=True).start()
    try:
        asyncio.run(server.serve(sockets=[sock]))
    finally:
        app.close()
    if failures:
        raise failures[0]
    if server.force_exit:
        raise KeyboardInterrupt
