"""Batch captioning: finding images, and an output file that holds every image exactly once whatever happens."""

import csv
import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_gpt import captioning
from mm_gpt.captioning import Summary, caption_images, caption_lines
from mm_gpt.captioning.inputs import ImageItem, TarSlice, find_images, identity, natural_key
from mm_gpt.captioning.output import FORMATS, CaptionFile, CaptionLine
from mm_gpt.document import Image
from mm_gpt.errors import MMGPTError
from mm_gpt.images import BYTES_PER_PIXEL
from mm_gpt.inference.assistant import Assistant, load
from mm_gpt.processor import TiledImage
from mm_gpt.templates.prompts import CAPTION_PROMPT

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
lines_strategy = st.lists(st.tuples(names, names, st.booleans()), max_size=5, unique_by=lambda r: identity(r[0]))


def to_line(name: str, text: str, is_error: bool) -> CaptionLine:
    return CaptionLine(name, error=text) if is_error else CaptionLine(name, caption=text)


def read_lines(path: Path) -> list[CaptionLine]:
    """Read the output by other means than our own code: what a user's script would do."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return [CaptionLine(r["image"], r["caption"] or None, r["error"] or None) for r in csv.DictReader(file)]
    values = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    return [CaptionLine(v["image"], v.get("caption"), v.get("error")) for v in values]


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    make_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def found(*inputs: str | Path) -> list[str]:
    return [item.name for item in find_images(inputs)]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten numbered photos, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(1, 11):
        make_picture(number).save(folder / f"img{number}.png")
    return folder


# ---- Finding images ----


def test_natural_order_of_folders_and_hidden_names(photos: Path) -> None:
    """Stops img10 before img2, and macOS's `._photo.jpg` shadows from becoming error lines."""
    (photos / "b").mkdir()
    (photos / ".cache").mkdir()
    for name in ("b/x.JPG", "._img1.png", ".cache/y.png", "notes.txt", "captions.json"):
        (photos / name).write_bytes(png())
    assert found("photos") == [f"photos/img{n}.png" for n in range(1, 11)] + ["photos/b/x.JPG"]
    assert sorted(["a10", "a9", "A1", "a09"], key=natural_key) == ["A1", "a09", "a9", "a10"]


def test_same_image_by_several_ways_appears_once(photos: Path) -> None:
    inputs = ["photos/img2.png", "./photos//img2.png", photos, "photos/*.png", "../" + photos.parent.name + "/photos"]
    assert found(*inputs) == ["photos/img2.png", *(str(photos / f"img{n}.png") for n in (1, 3, 4, 5, 6, 7, 8, 9, 10))]


def test_globs(photos: Path) -> None:
    (photos / "notes.txt").write_text("no image")
    (photos / "a[1].png").write_bytes(png())
    assert found("photos/img?.*")[-1] == "photos/img9.png"
    assert found("**/*.png") == found("photos")
    assert "photos/notes.txt" not in found("photos/*")
    assert found("photos/a[1].png") == ["photos/a[1].png"]  # an existing file wins over a pattern
    with pytest.raises(MMGPTError, match=r"photos/\*\.gif: no file matches"):
        find_images(["photos/*.gif"])


@pytest.mark.parametrize("name", ["missing.jpg", "", "data:image/png;base64,aaaa", "a\0b"])
def test_missing_input_is_refused_at_once(photos: Path, name: str) -> None:
    with pytest.raises(MMGPTError, match="no such file or folder"):
        find_images([photos, name])


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="holds no image"):
        find_images([tmp_path])


def test_tar_members(photos: Path) -> None:
    """Only images; a repeated member once; links and compressed tars are not followed."""
    write_tar(photos / "a.tar", {"1.png": png(1), "1.json": b"{}", "x/2.jpg": png(2), "._3.png": b"", "1.png ": b""})
    with tarfile.open(photos / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("1.png"))
    items = find_images(["photos/a.tar"])
    assert [item.name for item in items] == ["photos/a.tar/1.png", "photos/a.tar/x/2.jpg"]
    assert items[0].load().tobytes() == make_picture(1).tobytes()
    assert items[1].load().tobytes() == make_picture(2).tobytes()
    with tarfile.open(photos / "b.tar", "w:gz") as tar:
        tar.add(photos / "img1.png")
    (compressed,) = find_images(["photos/b.tar"])
    with pytest.raises(MMGPTError, match="not an uncompressed tar"):
        compressed.load()


def test_cut_off_tar_keeps_its_good_members(photos: Path, tiny_assistant: Assistant) -> None:
    write_tar(photos / "a.tar", {"1.png": png(1), "2.png": png(2)})
    data = (photos / "a.tar").read_bytes()
    (photos / "a.tar").write_bytes(data[: data.rindex(b"IHDR") + 20])
    (lines,) = caption_lines(tiny_assistant, find_images(["photos/a.tar"]), options={"max_new_tokens": 2})
    assert [(line.image, line.error is None) for line in lines] == [
        ("photos/a.tar/1.png", True),
        ("photos/a.tar/2.png", False),
        ("photos/a.tar", False),
    ]


def test_member_named_to_escape_its_tar_stays_in_it() -> None:
    """`../img.png` inside a tar must not count as the file beside the tar."""
    assert identity("s/a.tar/../img.png") != identity("s/img.png")
    assert identity("../x/a.png") == identity(os.path.join(os.path.dirname(os.getcwd()), "x/a.png"))


def left_out(*inputs: str | Path) -> tuple[list[str], dict[str, int]]:
    counts: Counter[str] = Counter()
    items = find_images(inputs, counts)
    return [item.name for item in items], dict(counts)


def test_what_is_no_image_is_counted(photos: Path) -> None:
    """In folders, globs and tars alike; hidden files are not there. Every kind that is read is found."""
    for number in range(4, 11):
        (photos / f"img{number}.png").unlink()
    for name in ("a.JFIF", "b.tif", "c.avif", "d.heic", "e.HEIC", "f.txt", "README", ".hidden.txt", "._img1.png"):
        (photos / name).write_bytes(png())
    images = ["photos/a.JFIF", "photos/b.tif", "photos/c.avif", *(f"photos/img{n}.png" for n in (1, 2, 3))]
    others = {".heic": 2, ".txt": 1, "": 1}
    assert left_out("photos") == left_out("photos/*") == (images, others)
    write_tar(photos / "a.tar", {"1.gif": png(1), "1.json": b"{}", "2.gif": png(2), "2.json": b"{}"})
    assert left_out("photos/a.tar") == (["photos/a.tar/1.gif", "photos/a.tar/2.gif"], {".json": 2})


def test_side_files_that_a_shell_names_are_left_out(photos: Path) -> None:
    """`caption photos/*` names each file. Stops: an error for each text that stands beside a photo."""
    for name, content in (("img1.json", b"{}"), ("img1.txt", b"a dog"), ("scan", png(3)), ("photo.heic", b"x")):
        (photos / name).write_bytes(content)
    named = sorted(str(path.relative_to(photos.parent)) for path in photos.iterdir())
    names, others = left_out(*named)
    assert others == {".json": 1, ".txt": 1}
    # An image by its content is one; a kind that is not read says so in its line.
    assert set(named) - set(names) == {"photos/img1.json", "photos/img1.txt"}
    with pytest.raises(MMGPTError, match=r"photos/img1.txt: holds no image \(.jpg, .jpeg,"):
        find_images(["photos/img1.json", "photos/img1.txt"])


def test_summary_is_one_line() -> None:
    kinds = {".txt": 12, ".heic": 3, "": 1, ".a": 1, ".b": 1, ".c": 1, ".d": 1}
    assert str(Summary(9, 4, 5, 1, False, kinds)) == (
        "done 9 of 9 (4 from before), errors 1; left out: 12 .txt, 3 .heic, 1, 1 .a, 1 .b, 2 more"
    )
    assert str(Summary(9, 0, 5, 0, True)) == "done 5 of 9, errors 0"


def test_huge_member_is_not_read() -> None:
    with pytest.raises(MMGPTError, match="larger than the limit"):
        ImageItem("a.tar/1.png", TarSlice("/nowhere.tar", 0, 2**40)).load()


# ---- The output file ----


@pytest.mark.parametrize("suffix", FORMATS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=lines_strategy)
def test_lines_come_back_as_they_were(tmp_path: Path, suffix: str, lines: list[tuple[str, str, bool]]) -> None:
    """Commas, quotes, line breaks and unicode in paths and captions, read by csv and json themselves."""
    path = tmp_path / f"out{suffix}"
    output = CaptionFile(path, overwrite=True)
    output.write([to_line(*line) for line in lines])
    output.close()
    assert read_lines(path) == [to_line(*line) for line in lines]
    output = CaptionFile(path)
    output.close()
    assert output.done == {identity(name): is_error for name, _, is_error in lines}


@pytest.mark.parametrize("suffix", FORMATS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=lines_strategy, data=st.data())
def test_torn_at_any_byte_then_continued_holds_each_image_once(
    tmp_path: Path, suffix: str, lines: list[tuple[str, str, bool]], data: st.DataObject
) -> None:
    """A kill may leave any beginning of the file. Stops a torn line that is kept, joined to the next, or lost."""
    path = tmp_path / f"torn{suffix}"
    output = CaptionFile(path, overwrite=True)
    output.write([to_line(*line) for line in lines])
    output.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    output = CaptionFile(path)
    output.write([to_line(*line) for line in lines if identity(line[0]) not in output.done])
    output.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_byte_offset(tmp_path: Path, suffix: str) -> None:
    lines = [
        CaptionLine('a,"b"\n\r.jpg', caption='A "man",\nhere'),
        CaptionLine("\udcff.png", error="é broken"),
        CaptionLine("c", caption=""),
    ]
    path = tmp_path / f"out{suffix}"
    output = CaptionFile(path)
    output.write(lines)
    output.close()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        output = CaptionFile(path)
        output.write([line for line in lines if identity(line.image) not in output.done])
        output.close()
        assert path.read_bytes() == whole, end


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("o.jsonl", b'{"a": 1}\n'),
        ("o.jsonl", b"my notes"),
        ("o.jsonl", b'{"image": 3}\n'),
        ("o.jsonl", b'{"image": "a.jpg", "caption": "x"}\n[]\n'),
        ("o.csv", b"name,age\n"),
        ("o.csv", b"name"),
        ("o.csv", b"image,caption,error\na,b\n"),
    ],
)
def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path, name: str, content: bytes) -> None:
    """Stops `-o notes.jsonl` from cutting the user's own last line off."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MMGPTError, match=name):
        CaptionFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["photo.jpg", "out", "no-folder/out.csv"])
def test_impossible_outputs(tmp_path: Path, name: str) -> None:
    with pytest.raises(MMGPTError, match=name):
        CaptionFile(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = CaptionFile(path)
    output.write([CaptionLine("a.jpg", error="broken"), CaptionLine("b.jpg", caption="B")])
    for overwrite in (False, True):
        with pytest.raises(MMGPTError, match="another process is writing it"):
            CaptionFile(path, overwrite=overwrite)
    output.close()
    # The lock must survive that retrying puts a new file in the place of the old one.
    retrying = CaptionFile(path, retry=[identity("a.jpg")])
    with pytest.raises(MMGPTError, match="another process"):
        CaptionFile(path)
    retrying.write([CaptionLine("a.jpg", caption="A")])
    retrying.close()
    assert read_lines(path) == [CaptionLine("b.jpg", caption="B"), CaptionLine("a.jpg", caption="A")]
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


# ---- Whole runs ----


def run(assistant: Assistant, inputs: list[str], out: Path, **changes: object) -> tuple[int, int, int, int]:
    options = {"max_new_tokens": 3, "num_beams": 1}
    summary = caption_images(lambda: assistant, inputs, out, options=options, **changes)  # type: ignore[arg-type]
    return summary.total, summary.before, summary.written, summary.errors


@pytest.mark.parametrize("suffix", FORMATS)
def test_broken_files_become_lines_and_can_be_retried(photos: Path, tiny_assistant: Assistant, suffix: str) -> None:
    out = Path(f"out{suffix}")
    (photos / "img3.png").write_bytes(b"")
    (photos / "img4.png").write_bytes(png()[:60])
    assert run(tiny_assistant, ["photos"], out, batch_size=3) == (10, 0, 10, 2)
    lines = read_lines(out)
    assert [line.image for line in lines] == [f"photos/img{n}.png" for n in range(1, 11)]
    assert lines[2].error == "empty"  # without the path, which stands beside it
    assert lines[3].error is not None
    assert lines[3].error.startswith("broken image")
    assert run(tiny_assistant, ["photos"], out) == (10, 10, 0, 2)
    make_picture(3).save(photos / "img3.png")
    # Only the images of this call are tried again: img4's line stays.
    assert run(tiny_assistant, ["photos/img3.png"], out, retry_errors=True) == (1, 0, 1, 0)
    assert {line.image for line in read_lines(out) if line.error} == {"photos/img4.png"}
    assert len(read_lines(out)) == 10
    assert run(tiny_assistant, ["photos"], out, overwrite=True) == (10, 0, 10, 1)


def test_lines_say_what_the_model_says_of_each_image(photos: Path, tiny_assistant: Assistant) -> None:
    """Stops captions that slip to the neighbour when a broken image is taken out of its batch."""
    (photos / "img2.png").write_bytes(b"GIF89a")
    items = find_images(["photos"])
    lines = [r for batch in caption_lines(tiny_assistant, items, batch_size=4) for r in batch]
    for line, item in zip(lines, items, strict=True):
        assert line.image == item.name
        if line.error is None:
            assert line.caption == tiny_assistant.caption([item.load()])[0].text
    assert len({line.caption for line in lines}) > 3


def test_prompt(photos: Path, tiny_assistant: Assistant) -> None:
    """The prompt reaches the model."""
    items = find_images(["photos"])[:4]

    def captions(prompt: str) -> list[str | None]:
        return [line.caption for lines in caption_lines(tiny_assistant, items, prompt=prompt) for line in lines]

    assert captions("Which colours?") != captions(CAPTION_PROMPT)


def test_nothing_to_do_loads_no_model(photos: Path, tiny_assistant: Assistant) -> None:
    out = Path("out.jsonl")
    run(tiny_assistant, ["photos"], out)

    def load() -> Assistant:
        raise AssertionError("loaded")

    assert caption_images(load, [photos], out).before == 10  # another spelling of the same images


def in_child(work: Callable[[], int]) -> "multiprocessing.process.BaseProcess":
    """Run `work` in a forked copy of this process: it starts at once, without importing torch again."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(work()))
    process.start()
    return process


def wait_for_lines(out: Path, count: int, process: "multiprocessing.process.BaseProcess") -> None:
    while process.is_alive() and (not out.exists() or out.read_bytes().count(b"\n") < count):
        time.sleep(0.001)


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_again_and_again(photos: Path, tiny_assistant: Assistant, suffix: str) -> None:
    """SIGKILL at several places; each run continues, and at the end every image is there once."""
    out = Path(f"out{suffix}")
    num_killed = 0
    for count in (1, 4, 6, 9):
        process = in_child(lambda: run(tiny_assistant, ["photos"], out, batch_size=2)[0])
        wait_for_lines(out, count, process)
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
    assert num_killed >= 2
    run(tiny_assistant, ["photos"], out)
    lines = read_lines(out)
    assert [line.image for line in lines] == [f"photos/img{n}.png" for n in range(1, 11)]
    fresh = Path(f"fresh{suffix}")
    run(tiny_assistant, ["photos"], fresh, batch_size=2)
    assert read_lines(fresh) == lines


def test_ctrl_c_writes_the_batch_and_says_how_to_go_on(photos: Path, tiny_model_folder: Path) -> None:
    from mm_gpt.commands.cli import main

    argv = ["caption", "photos", "-o", "out.jsonl", "--model", str(tiny_model_folder), "--batch-size", "2"]

    def work() -> int:
        sys.stderr = open("stderr.txt", "w")  # noqa: SIM115 (the process ends)
        code = main([*argv, "--max-new-tokens", "20"])
        sys.stderr.flush()
        return code

    process = in_child(work)
    wait_for_lines(Path("out.jsonl"), 2, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    num_lines = len(read_lines(Path("out.jsonl")))
    assert num_lines % 2 == 0
    assert 2 <= num_lines < 10
    message = Path("stderr.txt").read_text()
    assert "the same command continues out.jsonl" in message
    assert "Traceback" not in message
    assert main(argv) == 0
    assert [line.image for line in read_lines(Path("out.jsonl"))] == [f"photos/img{n}.png" for n in range(1, 11)]


def test_loaded_model_captions_a_tar_over_the_library(photos: Path, tiny_model_folder: Path) -> None:
    """The way of examples/caption_folder.py, with a model from its folder."""
    write_tar(photos.parent / "s.tar", {"k/1.png": png(1), "k/2.png": b"text"})
    summary = caption_images(lambda: load(tiny_model_folder), ["s.tar"], Path("out.csv"))
    assert (summary.written, summary.errors) == (2, 1)
    assert [line.image for line in read_lines(Path("out.csv"))] == ["s.tar/k/1.png", "s.tar/k/2.png"]


# ---- Limits of the machine ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_full_disk_keeps_what_is_there(photos: Path, tiny_assistant: Assistant, suffix: str) -> None:
    """One line that names the file; the next run goes on. Stops: a second error, with a traceback, as it is closed."""
    out, said = Path(f"out{suffix}"), Path("said.txt")
    run(tiny_assistant, ["photos"], Path(f"fresh{suffix}"), batch_size=2)
    size = Path(f"fresh{suffix}").stat().st_size

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 20, size - 20))
        try:
            run(tiny_assistant, ["photos"], out, batch_size=2)
        except MMGPTError as error:
            said.write_text(str(error))
            return 7
        return 0

    process = in_child(work)
    process.join()
    assert process.exitcode == 7
    assert said.read_text() == f"{out}: cannot be written (File too large)"
    assert [line.image for line in read_lines(out)] == [f"photos/img{n}.png" for n in range(1, 9)]
    assert run(tiny_assistant, ["photos"], out, batch_size=2) == (10, 8, 2, 0)
    assert out.read_bytes() == Path(f"fresh{suffix}").read_bytes()


def test_full_disk_while_errors_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    output = CaptionFile(path)
    output.write([CaptionLine("a.jpg", error="broken"), CaptionLine("b.jpg", caption="B")])
    output.close()
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mm_gpt.captioning.output.os.fsync", full)
        with pytest.raises(MMGPTError, match=r"out\.jsonl: cannot be written \(No space left on device\)"):
            CaptionFile(path, retry=[identity("a.jpg")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_a_stream(photos: Path, tiny_assistant: Assistant) -> None:
    stream = open("/dev/full", "wb")  # noqa: SIM115 (closed below, where nothing may be left to write)
    with pytest.raises(MMGPTError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        caption_images(lambda: tiny_assistant, ["photos"], stream, options={"max_new_tokens": 1, "num_beams": 1})
    stream.close()


def test_images_are_decoded_within_a_budget(
    photos: Path, tiny_assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops: memory that grows with the batch and the threads. Pixels of files are gone before the model runs."""
    pixels = make_picture(1).width * make_picture(1).height
    monkeypatch.setattr(captioning, "DECODING_BYTES", 2 * pixels * BYTES_PER_PIXEL)
    inside: list[int] = []
    most, shown = [], []
    tiled, caption = tiny_assistant.processor.tiled, tiny_assistant.caption

    def spied(image: Image) -> TiledImage:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        result = tiled(image)
        inside.pop()
        return result

    def spied_caption(images: list[TiledImage], **options: object) -> object:
        shown.extend(images)
        return caption(images, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_assistant.processor, "tiled", spied)
    monkeypatch.setattr(tiny_assistant, "caption", spied_caption)
    items = find_images(["photos"])
    lines = [line for batch in caption_lines(tiny_assistant, items, batch_size=10) for line in batch]
    assert len(lines) == 10
    assert max(most) == 2
    assert all(isinstance(image, TiledImage) and isinstance(image.source, str) for image in shown)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep(given: str | None, expected: str) -> None:
    """The policy is read when torch is imported. Spinning threads made captions slower by seven on busy cores."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            sys.exit("policy " + os.environ.get("OMP_WAIT_POLICY", "none"))
sys.meta_path.insert(0, Watch())
from mm_gpt.commands.cli import main
main(["caption", "."])
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == f"policy {expected}"
