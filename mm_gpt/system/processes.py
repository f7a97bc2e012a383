"""Processes that end with the one that started them, and at once when their work is done.

A worker whose parent was killed would wait for its next task for ever, and keep its memory: nobody is left to stop it.
So each worker watches its parent (`watch_parent`), and a parent that is asked to stop (`sigterm_raises`) ends its
workers before itself (`process_pool`).
"""

import atexit
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, Never

EXIT_TERMINATED = 128 + signal.SIGTERM
SECONDS = 1.0
"""Between two looks at the parent, where the system does not tell."""


class Terminated(SystemExit):
    """SIGTERM has come. Ends the program with the exit code that shells give for it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the main thread, so that what is open is closed; elsewhere nothing changes.

    Also a decorator.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(code: int) -> Never:
    """End the process as Python does, but for taking apart what was imported: with torch, half a second and 120 MB.

    Threads are waited for, `atexit` functions run and streams are flushed, which is how `multiprocessing` ends its
    processes. The exit code is 120, Python's own, where a stream cannot be flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or closed
            code = code or 120
    os._exit(code)


def refuse_a_second_run() -> None:
    """Raises RuntimeError in a spawned process that has yet to run its task, and runs its parent's script before.

    A script without `if __name__ == "__main__":` would do there all that it does; and wait for its parent's locks.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError('this script starts processes, which run it again: put it under if __name__ == "__main__":')


def watch_parent() -> None:
    """Called in a process of `multiprocessing`, whatever its start method: it ends when the one that started it does.

    Raises RuntimeError in a process that is nobody's worker.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process has no parent to watch")
    if sys.platform == "linux":
        # The kernel's own signal, SIGIO, ends a process that holds Python's lock for ever, in a regular expression say.
        # Not PR_SET_PDEATHSIG: that one also comes when no more than a thread of the parent ends.
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_end_with, args=(parent, os.getppid()), name="watch-parent", daemon=True).start()


def _end_with(parent: BaseProcess, started_by: int) -> None:
    """`started_by` is the parent or its fork server; a pipe to the parent may be held open by its other children."""
    while parent.is_alive() and os.getppid() == started_by:
        parent.join(SECONDS)
    os._exit(1)


@contextmanager
def process_pool(
    workers: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    start_method: str | None = "spawn",
) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one. Left by an exception, they are ended at once, whatever they work on.

    They are spawned: a fork of a process with threads may hang. `start_method` None: as this system does.
    """
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(initializer, initargs)) as pool:
        try:
            yield pool
        except BaseException:
            running = list((pool._processes or {}).values())  # no public name before Python 3.14
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def _start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent ends these
    watch_parent()
    if initializer is not None:
        initializer(*initargs)
