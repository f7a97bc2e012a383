"""Threads that stay, and run one compiled function together, faster than a pool of Python's could be woken.

The caller's thread is the first of the team. The others spin for about a millisecond when there is nothing to do, and
then sleep until the next run, so that an idle process costs nothing and the steps of a running one find them awake.
Within a run, phases are separated by `write_barrier`; who waits long there gives its processor away, so that a busy
machine slows down and does not stall.
"""

import atexit
import ctypes
import os
import threading
from pathlib import Path

from llvmlite import ir

from mm_gpt.kernels.library import library
from mm_gpt.kernels.processor import host_isa
from mm_gpt.kernels.simd import I32, I64, VOID, Code, Module, Value

# Where things lie in a team's memory, a cache line for each thing that different threads write.
TICKET, ARRIVED, SLEEPING, JOB, MUTEX, CONDITION, SIZE = 0, 128, 256, 384, 512, 640, 768
FUNCTION, ARGUMENT, BASE, NUM_THREADS, STOP = (JOB + 8 * i for i in range(5))
SPINS_BEFORE_YIELD = 2_000
SPINS_BEFORE_SLEEP = 20_000


def _atomic(code: Code, address: Value, offset: int) -> ir.Value:
    return code.builder.inttoptr((address + offset).ir, I64.as_pointer())


def _read(code: Code, address: Value, offset: int, order: str = "acquire") -> Value:
    return Value(code, code.builder.load_atomic(_atomic(code, address, offset), order, align=8))


def _add(code: Code, address: Value, offset: int, amount: int) -> None:
    code.builder.atomic_rmw("add", _atomic(code, address, offset), ir.Constant(I64, amount), "seq_cst")


def _libc(code: Code, name: str, *args: Value) -> None:
    """A function of the C library that takes addresses and returns an int that nobody needs."""
    function = code.module.declare(name, I32, [I64] * len(args))
    code.builder.call(function, [arg.ir for arg in args])


def _pause(code: Code, spins: Value) -> None:
    """What a spinning thread does: lets the other thread of its core work and, when it is late, other processes."""
    triple = str(code.module.ir.triple)
    if triple.startswith(("x86_64", "i686")):
        code.builder.call(code.module.declare("llvm.x86.sse2.pause", VOID, []), [])
    elif triple.startswith(("aarch64", "arm64")):
        code.builder.call(code.module.declare("llvm.aarch64.hint", VOID, [I32]), [ir.Constant(I32, 1)])
    late = (spins > SPINS_BEFORE_YIELD).where((spins & 63).compare("==", 0), code.i64(0).compare("!=", 0))
    with code.when(late):
        _libc(code, "sched_yield")


def write_barrier(module: Module) -> ir.Function:
    """`barrier(team, target)`: nobody goes on before `target` arrivals, counted since the team began."""
    with module.function("barrier", 2, inline=False) as (code, (team, target)):
        _add(code, team, ARRIVED, 1)
        spins = code.variable(code.i64(0))
        with code.repeat() as leave_if:
            leave_if(_read(code, team, ARRIVED) >= target)
            spins.set(spins.get() + 1)
            _pause(code, spins.get())
    return module.ir.globals["barrier"]


def _wake(code: Code, team: Value) -> None:
    """Others find a new ticket, or are woken to find it."""
    _add(code, team, TICKET, 1)
    with code.when(_read(code, team, SLEEPING, "seq_cst") > 0):
        _libc(code, "pthread_mutex_lock", team + MUTEX)
        _libc(code, "pthread_cond_broadcast", team + CONDITION)
        _libc(code, "pthread_mutex_unlock", team + MUTEX)


def _write_team(module: Module) -> None:
    with module.function("stop", 1, exported=True) as (code, (team,)):
        code.store(code.i64(1), team, STOP)
        _wake(code, team)

    with module.function("run", 3, exported=True) as (code, (team, function, argument)):
        code.store(function, team, FUNCTION)
        code.store(argument, team, ARGUMENT)
        code.store(_read(code, team, ARRIVED), team, BASE)
        _wake(code, team)
        code.call_address(function, argument, 0, code.load_i64(team, NUM_THREADS), team)

    with module.function("work", 2, exported=True) as (code, (team, index)):
        seen = code.variable(code.i64(0))
        with code.repeat() as end_if:
            spins = code.variable(code.i64(0))
            with code.repeat() as leave_if:
                leave_if(_read(code, team, TICKET).compare("!=", seen.get()))
                leave_if(spins.get() > SPINS_BEFORE_SLEEP)
                spins.set(spins.get() + 1)
                _pause(code, spins.get())
            with code.when(_read(code, team, TICKET).compare("==", seen.get())):
                _libc(code, "pthread_mutex_lock", team + MUTEX)
                _add(code, team, SLEEPING, 1)  # before the ticket is looked at again: `run` does it the other way round
                with code.repeat() as leave_if:
                    leave_if(_read(code, team, TICKET, "seq_cst").compare("!=", seen.get()))
                    _libc(code, "pthread_cond_wait", team + CONDITION, team + MUTEX)
                _add(code, team, SLEEPING, -1)
                _libc(code, "pthread_mutex_unlock", team + MUTEX)
            end_if(_read(code, team, STOP) > 0)
            seen.set(seen.get() + 1)
            function, argument = code.load_i64(team, FUNCTION), code.load_i64(team, ARGUMENT)
            code.call_address(function, argument, index, code.load_i64(team, NUM_THREADS), team)


class Team:
    """`num_threads` threads, the caller's included. One run at a time: others wait."""

    def __init__(self, num_threads: int):
        self.num_threads = num_threads
        functions = library("team", host_isa(), _write_team)
        self._memory = ctypes.create_string_buffer(SIZE + 128)
        self._address = (ctypes.addressof(self._memory) + 127) // 128 * 128
        process = ctypes.CDLL(None)
        process.pthread_mutex_init(ctypes.c_void_p(self._address + MUTEX), None)
        process.pthread_cond_init(ctypes.c_void_p(self._address + CONDITION), None)
        ctypes.c_int64.from_address(self._address + NUM_THREADS).value = num_threads
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(functions.address("run"))
        self._work = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2)(functions.address("work"))
        self._stop = ctypes.CFUNCTYPE(None, ctypes.c_int64)(functions.address("stop"))
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(self._address, index), name="mm-gpt-team", daemon=True)
            for index in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: int, argument: int) -> None:
        """Calls `function(argument, thread, num_threads, team)`, compiled, in every thread at once.

        It must end with a barrier. The GIL is released meanwhile.
        """
        with self._lock:
            self._run(self._address, function, argument)

    def stop(self) -> None:
        """Ends the threads. While Python itself ends, their code and memory would go away under them."""
        with self._lock:
            self._stop(self._address)
        for thread in self._threads:
            thread.join()


_teams: dict[tuple[int, int], Team] = {}
_making = threading.Lock()


def team(num_threads: int) -> Team:
    """The process's team of that size. It lives as long as the process: its threads hold its memory."""
    key = (os.getpid(), num_threads)  # a forked process has the memory of its parent's team, but not its threads
    with _making:
        if key not in _teams:
            _teams[key] = Team(num_threads)
        return _teams[key]


@atexit.register
def _stop_all() -> None:
    for (process, _), made in _teams.items():
        if process == os.getpid():
            made.stop()


def default_threads(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, by the quota of its cgroup, and no core twice."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    quota = _cgroup_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Cores' worth of time that the process's control groups allow, the least of all levels; None: no limit."""
    limits = []
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / name.lstrip("/")
        # Inside a container the name may be the host's, and what lies at the top is the container's own.
        for level in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            limits.append(_quota_of(level))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():  # the second version of control groups
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such file; "max"
        return None
