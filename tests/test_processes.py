"""Workers end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_gpt.system.processes import EXIT_TERMINATED, Terminated, process_pool, sigterm_raises

PATIENCE = 60.0
"""Seconds that a loaded machine may take; what is waited for takes one or two."""
WORK = """
import multiprocessing, os, re, signal, sys, time
from pathlib import Path
from mm_gpt.system.processes import process_pool, sigterm_raises, watch_parent

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may ignore it, under nohup say

def work(kind):
    watch_parent() if kind != "pool" else None
    folder = Path(sys.argv[1])
    (folder / str(os.getpid())).touch()
    if kind == "lock":  # never gives up Python's lock
        re.match("(a+)+$", "a" * 64 + "b")
    time.sleep(600)


"""
STARTED = """
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    workers = [context.Process(target=work, args=(kind,)) for kind in ("sleep", "lock", "sleep")]
    for worker in workers:
        worker.start()
    workers[0].join()
"""
POOL = """
if __name__ == "__main__":
    with sigterm_raises(), process_pool(2) as pool:
        list(pool.map(work, ["pool"] * 3))
"""
LOADER = """
import torch


class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, at):
        (Path(sys.argv[1]) / str(os.getpid())).touch()
        time.sleep(600)


if __name__ == "__main__":
    next(iter(torch.utils.data.DataLoader(Stuck(), num_workers=2, worker_init_fn=lambda number: watch_parent())))
"""


def wait_until(ready: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def end_parent(code: str, number: int, how: signal.Signals, folder: Path, *arguments: str) -> int:
    """Run `code`, send its process a signal once `number` workers are at work, and wait for them to be gone."""
    script = folder / "script.py"
    script.write_text(WORK + code)
    (folder / "workers").mkdir()
    workers: list[int] = []
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder / "workers"), *arguments], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: parent.poll() is not None or len(list((folder / "workers").iterdir())) == number)
        assert parent.poll() is None
        workers = [int(path.name) for path in (folder / "workers").iterdir()]
        assert all(map(is_running, workers))
        parent.send_signal(how)
        wait_until(lambda: not any(map(is_running, workers)))
        return parent.wait(PATIENCE)
    finally:
        parent.kill()
        parent.wait()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_workers_end_with_a_killed_parent(method: str, tmp_path: Path) -> None:
    """Also one that never lets another thread of its own look (on Linux, where the kernel tells)."""
    started = STARTED if sys.platform == "linux" else STARTED.replace('"lock"', '"sleep"')
    assert end_parent(started, 3, signal.SIGKILL, tmp_path, method) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_TERMINATED), (signal.SIGHUP, -1)]
)
def test_a_pool_ends_with_its_parent(how: signal.Signals, code: int, tmp_path: Path) -> None:
    assert end_parent(POOL, 2, how, tmp_path) == code


def test_loader_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Those of DataLoader look at their parent only between two samples."""
    end_parent(LOADER, 2, signal.SIGKILL, tmp_path)


def test_an_error_does_not_wait_for_other_workers() -> None:
    with pytest.raises(ZeroDivisionError), process_pool(2) as pool:  # noqa: PT012
        pool.submit(time.sleep, 600)
        pool.submit(divmod, 1, 0).result()


def test_sigterm_raises_and_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as stopped, sigterm_raises():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
    assert stopped.value.code == EXIT_TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_has_no_parent_cannot_watch_it() -> None:
    code = "from mm_gpt.system.processes import watch_parent; watch_parent()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: this process has no parent to watch" in done.stderr
