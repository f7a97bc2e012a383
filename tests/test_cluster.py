"""Corpora on a cluster: the same bytes as on one machine, whatever dies on the way."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_gpt.datasets.building import corpus, parts, splits
from mm_gpt.datasets.building.cluster import ATTEMPTS, RayRunner, _RayTask
from mm_gpt.datasets.building.corpus import build_corpus
from mm_gpt.datasets.building.corpus_config import CorpusConfig
from mm_gpt.datasets.building.runner import Runner
from mm_gpt.errors import ConfigError, MMGPTError

OBJECT_STORE = 80 * 2**20
CONFIG = CorpusConfig(filters="none", personal_data=False, shard_mb=1)
COMMON = """<p>Every page of the collection ends with the same paragraph about the people who wrote it and why.</p>"""


def write_pages(folder: Path, number: int) -> Path:
    """Pages with a noisy picture each; every fifth is the one before it again."""
    folder.mkdir()
    for n in range(number):
        at = n - 1 if n % 5 == 4 else n
        words = " ".join(f"house {at * 31 + k} stands by river {at * 17 + k * k}," for k in range(30))
        pixels = np.random.default_rng(at).integers(0, 256, (200, 250, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{n:03d}.png")
        (folder / f"{n:03d}.html").write_text(
            f"<html><head><title>Page {at}</title></head><body><article><h1>Page {at}</h1><p>{words} and so on.</p>"
            f"<img src='{n:03d}.png'>{COMMON}</article></body></html>"
        )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pages, a dozen splits, several shards."""
    monkeypatch.setattr(splits, "PAGES_IN_SPLIT", 2)
    return write_pages(tmp_path / "pages", 24)


@pytest.fixture
def on_one_machine(pages: Path, tmp_path: Path) -> dict[str, bytes]:
    build_corpus([str(pages)], tmp_path / "one", CONFIG, runner=Runner(1, progress=False))
    found = contents(tmp_path / "one")
    assert len([name for name in found if name.endswith(".tar")]) > 1
    assert json.loads(found["corpus.json"])["samples"] == 20  # four were there twice
    return found


# ---- Parts are made once ----


def make(folder: Path, *, made: list[Path], before: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    (folder / "data").write_text("the same")
    made.append(folder)
    before()
    return {"made": 1}


def test_attempts_at_one_time(tmp_path: Path) -> None:
    """Two machines, told apart by neither name nor process, once wrote into one temporary folder."""
    made: list[Path] = []
    together = threading.Barrier(3)
    reports: list[Any] = []

    def attempt() -> None:
        reports.append(parts.once(tmp_path / "part", partial(make, made=made, before=together.wait)))

    threads = [threading.Thread(target=attempt) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 3
    assert reports == [{"made": 1}] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert (tmp_path / "part" / "data").read_text() == "the same"


class Killed(BaseException):
    """Nothing of the program runs after a SIGKILL, clean-up neither."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def test_killed_before_the_part_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed attempt left behind is no part, and is in nobody's way."""
    made: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            parts.once(tmp_path / "part", partial(make, made=made, before=kill))
    assert [path.name[:6] for path in tmp_path.iterdir()] == [".part."]
    assert parts.once(tmp_path / "part", partial(make, made=made)) == {"made": 1}
    assert len(made) == 2


def test_killed_after_the_part_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task never said that it was done: its second attempt finds the part, and makes no other."""
    made: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_json", kill)
        with pytest.raises(Killed):
            parts.once(tmp_path / "part", partial(make, made=made))
    assert parts.once(tmp_path / "part", partial(make, made=made)) == {"made": 1}
    assert len(made) == 1


def test_leftovers_go(pages: Path, tmp_path: Path, on_one_machine: dict[str, bytes]) -> None:
    """Neither parts of killed attempts nor shards that a killed build had moved already change the corpus."""
    out = tmp_path / "out"

    class Stopping(Runner):
        def __call__(self, what: str, function: Any, items: Sequence[Any]) -> Iterator[Any]:
            for n, result in enumerate(super().__call__(what, function, items)):
                if what == "write shards" and n == 1:
                    raise Killed
                yield result

    with pytest.raises(Killed):
        build_corpus([str(pages)], out, CONFIG, runner=Stopping(1, progress=False))
    assert (out / "shard-00000-00000.tar").is_file()
    (work,) = (path for path in (out / corpus.WORK).iterdir() if path.is_dir())
    for name in (".split-000003.0123", ".group-00001.4567", ".drop.89ab"):
        (work / name).mkdir()
        (work / name / "shard-00000.tar").write_text("half")
    build_corpus([str(pages)], out, CONFIG, runner=Runner(1, progress=False))
    assert contents(out) == on_one_machine


def test_a_machine_without_the_files_says_so(pages: Path, tmp_path: Path) -> None:
    """Its pages once were all counted as unreadable, and the build went on."""
    split = corpus.find_splits([str(pages)])[0]
    with pytest.raises(MMGPTError, match=r"work: not there on"):
        corpus._Process(CONFIG, tmp_path / "work")(split)
    (tmp_path / "work").mkdir()
    pages.rename(tmp_path / "elsewhere")
    with pytest.raises(MMGPTError, match=r"pages: not there on .*; all machines must see it"):
        corpus._Process(CONFIG, tmp_path / "work")(split)
    assert not list((tmp_path / "work").iterdir())


# ---- Without a cluster ----


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MMGPTError, match="ray is not installed; in the folder of the checkout"):
        list(RayRunner(progress=False)("x", str, [1]))


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "127.0.0.1:x", "127.0.0.1:1", "nowhere.invalid:6379"])
def test_no_such_cluster(address: str) -> None:
    """Ray tries for minutes to reach a wrong address, and its client would run the build elsewhere than it says."""
    start = time.monotonic()
    with pytest.raises(MMGPTError, match=address) as caught:
        list(RayRunner(address, progress=False)("x", str, [1]))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_other_version() -> None:
    """Machines with another mm-gpt filter otherwise, and nobody would notice."""
    row = _RayTask(str, "0.0.0")({"number": 7, "item": b""})
    assert row["number"] == 7
    assert "0.0.0 where the build was started" in row["error"]


# ---- Ray on this machine ----


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else workers wait for all other processes of a busy machine
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    yield module
    module.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    module.shutdown()


def backwards(item: int) -> dict[str, Any]:
    time.sleep((4 - item) * 0.2)
    return {"item": item, "process": os.getpid()}


def fails(folder: Path, item: int) -> int:
    (folder / str(item)).touch()
    if item == 2:
        raise ConfigError("part 2: wrong")
    time.sleep(0.3)
    return item


def dies(folder: Path, item: int) -> int:
    if item == 1:
        (folder / f"attempt-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.slow
def test_results_come_in_order_and_errors_at_once(ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RayRunner(workers=2, progress=False) as runner:
        # The last are ready first.
        assert [row["item"] for row in runner("count", backwards, range(5))] == list(range(5))
        with pytest.raises(MMGPTError, match=r"^part 2: wrong$"):
            list(runner("fail", partial(fails, tmp_path), range(100)))
    assert len(list(tmp_path.iterdir())) < 20
    assert not ray.is_initialized()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_ray_on_this_machine(ray: Any, pages: Path, on_one_machine: dict[str, bytes], tmp_path: Path) -> None:
    with RayRunner(workers=2, progress=False) as runner:
        build_corpus([str(pages)], tmp_path / "out", CONFIG, runner=runner)
    assert contents(tmp_path / "out") == on_one_machine


@pytest.mark.slow
def test_what_kills_every_process_is_given_up(ray: Any, tmp_path: Path) -> None:
    """Ray Data by itself tries for ever."""
    with RayRunner(workers=2, progress=False) as runner, pytest.raises(MMGPTError, match="gave up") as caught:
        list(runner("die", partial(dies, tmp_path), range(3)))
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.glob("attempt-*"))) == ATTEMPTS


# ---- A cluster of two machines, one of which dies ----


@dataclass(frozen=True)
class Watched:
    """Leaves a note of who begins and ends which part, and takes its time before and after the work."""

    function: Callable[[Any], Any]
    notes: Path

    def __call__(self, item: Any) -> Any:
        import ray

        node = ray.get_runtime_context().get_node_id()
        name = f"{getattr(item, 'number', 'group')}.{node}.{os.getpid()}"
        (self.notes / f"{name}.began").touch()
        time.sleep(0.5)
        result = self.function(item)
        time.sleep(0.5)
        (self.notes / f"{name}.ended").touch()
        return result


class WatchedRunner(RayRunner):
    notes: Path

    def results(self, function: Any, items: Sequence[Any]) -> Iterator[Any]:
        return super().results(Watched(function, self.notes), items)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_dies(ray: Any, pages: Path, on_one_machine: dict[str, bytes], tmp_path: Path) -> None:
    """The corpus is the same to the byte, although a machine is killed while it works on a part."""
    psutil = pytest.importorskip("psutil")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    notes = tmp_path / "notes"
    notes.mkdir()
    try:
        victim = cluster.add_node(**size)
        runner = WatchedRunner(cluster.address, progress=False)
        runner.notes = notes

        def noted(what: str, node: str = "*") -> set[str]:
            return {path.stem for path in notes.glob(f"*.{node}.*.{what}")}

        def build() -> None:
            build_corpus([str(pages)], tmp_path / "out", CONFIG, runner=runner)

        builder = threading.Thread(target=build, daemon=True)
        builder.start()
        deadline = time.monotonic() + 240
        while not (noted("ended", victim.node_id) and noted("began", victim.node_id) - noted("ended", victim.node_id)):
            assert builder.is_alive()
            assert time.monotonic() < deadline, "nothing ran on the second machine"
            time.sleep(0.05)
        raylet = victim.all_processes["raylet"][0].process.pid
        processes = [psutil.Process(raylet), *psutil.Process(raylet).children(recursive=True)]
        for process in processes:
            process.kill()
        lost = noted("began", victim.node_id) - noted("ended", victim.node_id)
        builder.join(timeout=300)
        assert not builder.is_alive()
        runner.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert lost  # a part was in work there,
    begun = Counter(name.partition(".")[0] for name in noted("began") if not name.startswith("group"))
    assert all(begun[name.partition(".")[0]] > 1 for name in lost)  # and was begun again
    assert len(begun) == 12
    assert contents(tmp_path / "out") == on_one_machine
