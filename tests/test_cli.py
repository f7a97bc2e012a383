"""The command line: what goes to stdout, one line for each mistake, exit codes, nothing heavy before it is needed."""

import dataclasses
import importlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import make_picture

import mm_gpt
from mm_gpt.commands import ask as ask_command
from mm_gpt.commands.cli import COMMANDS, main
from mm_gpt.commands.command import check_folder
from mm_gpt.hub import checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A picture in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_picture().save("picture.png")
    return "picture.png"


@pytest.fixture
def model(tiny_model_folder: Path) -> list[str]:
    return ["--model", str(tiny_model_folder), "--max-new-tokens", "12"]


def give_stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- Help and usage ----


def test_help_and_version_import_nothing_heavy() -> None:
    """Stops an import at the top of a light module from making `mm-gpt --help` take seconds."""
    script = f"""
import contextlib, io, sys
from mm_gpt.commands.cli import main
for argv in [["--help"], ["--version"], ["nope"], *([*name.split(), "--help"] for name in {list(COMMANDS)})]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(argv)
heavy = {{"torch", "numpy", "PIL", "transformers", "open_clip", "gradio", "webdataset", "matplotlib"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_through_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "mm_gpt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mm-gpt {mm_gpt.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name: str, capsys: Capture) -> None:
    """Stops an example in the help that the parser itself refuses."""
    import argparse
    import shlex

    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for example in COMMANDS[name].examples:
        assert example in shown
        words = shlex.split(example.partition("| mm-gpt")[2] or example.removeprefix("mm-gpt").partition(" | ")[0])
        named = name.split()
        assert words[: len(named)] == named
        parser = argparse.ArgumentParser(exit_on_error=False)
        COMMANDS[name].add_arguments(parser)
        parser.parse_intermixed_args(words[len(named) :])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["captoin"], "did you mean 'caption'?"),
        (["ask"], "IMAGE ... QUESTION"),
        (["ask", "picture.png"], "the question is missing after picture.png"),
        (["ask", "picture.png", "picture.png"], "the question is missing after picture.png"),
        (["ask", "picture.png", " "], "the question is empty"),
        (["ask", "What is it?", "picture.png"], "mm-gpt ask picture.png 'What is it?'"),
        (["ask", "What is it?", "misspelt.png"], "the question comes last"),
        (["ask", "What is it?", "https://example.org/a"], "the question comes last"),
        (["ask", "-", "-"], "give one -"),
        (["chat", "-"], "chat reads its questions from standard input"),
        (["caption", "-"], "mm-gpt ask -"),
        (["picture.png", "What is it?"], "mm-gpt ask picture.png QUESTION"),
        (["ask", "picture.png", "What?", "--num_beams", "2"], "did you mean --num-beams?"),
        (["ask", "picture.png", "What?", "--zoom", "2"], "unrecognized arguments: --zoom 2"),
        (["dance"], "unknown command 'dance' (known: "),
        (["ask", "picture.png", "What?", "--temprature", "1"], "--temprature"),
        (["caption"], "INPUT"),
        (["caption", "picture.png", "--batch-size", "0"], "'0' is not a whole number above 0"),
        (["caption", "picture.png", "--retry-errors"], "need -o FILE"),
        (["caption", "picture.png", "-o", "o.csv", "--retry-errors", "--overwrite"], "not allowed with"),
        (["train"], "name a recipe"),
        (["demo", "--port", "http"], "'http'"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], said: str, picture: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    usage, error = captured.err.strip().split("\nmm-gpt: error: ")
    assert usage.startswith("usage: mm-gpt")
    assert said in error
    assert "\n" not in error


# ---- Mistakes ----


def _png_with_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "truncated.png": lambda: Path("picture.png").read_bytes()[:80],
    "renamed-tiff.jpg": lambda: b"II*\0" + b"\0" * 100,
    "20000x20000.png": lambda: _png_with_header(20_000, 20_000),
    "text.jpg": lambda: b"This is no picture.\n" * 20,
    "page.png": lambda: b"<html><body>404</body></html>",
}


def assert_one_line(captured: Any, *said: str) -> None:
    assert captured.out == ""
    assert captured.err.startswith("mm-gpt: error: ")
    assert captured.err.count("\n") == 1
    for text in said:
        assert text in captured.err


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(name: str, picture: str, model: list[str], capsys: Capture) -> None:
    """Each is one line that names the file for `ask` and `chat`, and a row with its error for `caption`."""
    Path(name).write_bytes(BAD_IMAGES[name]())
    assert main(["ask", picture, name, "What is it?", *model]) == 1
    assert_one_line(capsys.readouterr(), name)
    assert main(["chat", name, *model]) == 1
    assert_one_line(capsys.readouterr(), name)
    assert main(["caption", name, picture, *model]) == 3
    captured = capsys.readouterr()
    bad, good = map(json.loads, captured.out.splitlines())
    assert bad["image"] == name
    assert bad["error"]
    assert "caption" in good
    assert captured.err.endswith("\nmm-gpt: done 2 of 2, errors 1\n")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("missing.jpg", "No such file"),
        (".", "is a folder"),
        ("new\nline.jpg", "No such file"),
        ("http://127.0.0.1:9/a.jpg", "127.0.0.1"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("http://[::1]/a.jpg", "::1"),
        ("file:///etc/passwd", "file:///etc/passwd"),
    ],
)
def test_bad_image_path_or_url(image: str, said: str, picture: str, model: list[str], capsys: Capture) -> None:
    assert main(["ask", image, "What is it?", *model]) == 1
    assert_one_line(capsys.readouterr(), said)


def test_private_url_is_a_row(picture: str, model: list[str], capsys: Capture) -> None:
    assert main(["caption", "http://localhost/a.png", *model]) == 3
    assert "localhost" in json.loads(capsys.readouterr().out)["image"]


def test_caption_of_a_missing_input(picture: str, model: list[str], capsys: Capture) -> None:
    """A typo is refused before anything is written: it must not become a row of a finished file."""
    assert main(["caption", picture, "photso/", "-o", "out.jsonl", *model]) == 1
    assert_one_line(capsys.readouterr(), "photso/: no such file or folder")
    assert not Path("out.jsonl").exists()


def test_unknown_model_suggests_the_closest(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "shipped" / "default").mkdir(parents=True)
    (tmp_path / "shipped" / "default" / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    for argv in (["ask", picture, "What?"], ["chat"], ["caption", picture], ["caption", picture, "-o", "o.csv"]):
        assert main([*argv, "--model", "defualt"]) == 1
        assert_one_line(capsys.readouterr(), "'defualt'", "did you mean 'default'?")


def test_folder_for_ask_names_caption(picture: str, capsys: Capture) -> None:
    Path("photos").mkdir()
    assert main(["ask", "photos", "What is it?"]) == 1
    assert_one_line(capsys.readouterr(), "photos: is a folder", "mm-gpt caption")


@pytest.mark.parametrize("argv", [["ask", "Is it caf\udce9?"], ["caption", "picture.png", "--prompt", "\ud83d"]])
def test_half_a_character_on_the_command_line(argv: list[str], picture: str, model: list[str], capsys: Capture) -> None:
    """What a terminal with another encoding sends: a lone surrogate, which the tokenizer would die of."""
    assert main([*argv, *model]) == 1
    assert_one_line(capsys.readouterr(), "half a character")


def test_half_a_character_in_a_chat_is_that_turn_only(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_stdin(monkeypatch, "caf\udce9?\nWhat?\n")
    assert main(["chat", *model]) == 1
    printed = capsys.readouterr()
    assert "half a character" in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out.strip()


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is wrong could be known before."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    for module in ("inference.assistant", "hub.checkpoint", "hub.export.export_model"):
        monkeypatch.setattr(importlib.import_module(f"mm_gpt.{module}"), "load_model", load)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eval", "--task", "vqa", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["eval", "--task", "vqa", "--data", ".", "--contamination", "no.json"], "no.json: no such file or folder"),
        (["eval", "--task", "vqa", "--data", ".", "-o", "picture.png/r.json"], "picture.png is not a folder"),
        (["eval", "--task", "vqa", "--data", ".", "--seed", "-1"], "seed"),
        (["export", "default", "--out", "picture.png/exported"], "picture.png is not a folder"),
        (["export", "default", "--out", "picture.png"], "picture.png: a file"),
        (["caption", "picture.png", "-o", "picture.png/captions.csv"], "picture.png/captions.csv"),
        (["corpus", "quality", "picture.png", "--raw", "nowhere", "--out", "q"], "nowhere: no such file or folder"),
        (["corpus", "tokenizer", "picture.png", "--out", "picture.png/t"], "picture.png is not a folder"),
        (["corpus", "contamination", "nowhere", "--eval", "vqa=picture.png", "--out", "c"], "nowhere: no such file"),
        (["corpus", "build", ".", "--out", "picture.png/corpus"], "picture.png is not a folder"),
        (["train", "tiny", "--out", "picture.png/run"], "picture.png is not a folder"),
    ],
)
def test_what_costs_nothing_is_checked_first(
    argv: list[str], said: str, picture: str, no_model: None, capsys: Capture
) -> None:
    assert main(argv) == 1
    assert_one_line(capsys.readouterr(), said)


def test_demo_knows_a_taken_port_before_it_loads(no_model: None, capsys: Capture) -> None:
    pytest.importorskip("gradio", reason="the demo needs gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    assert_one_line(capsys.readouterr(), f"127.0.0.1 port {port}")
    assert main(["demo", "--host", "no.such.host.invalid"]) == 1
    assert_one_line(capsys.readouterr(), "no.such.host.invalid")


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # for root everything is writable
    with pytest.raises(mm_gpt.MMGPTError, match="no permission to write into"):
        check_folder(tmp_path / "a/b")
    (tmp_path / "a").mkdir()
    check_folder(tmp_path / "a/b")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_corrupt_model(
    name: str, damage: str, picture: str, tiny_model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Half a copy, as after a full disk, or a missing file: named, without a traceback."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model_folder, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    if damage == "gone":
        (folder / name).unlink()
    assert main(["ask", picture, "What?", "--model", str(folder)]) == 1
    assert_one_line(capsys.readouterr(), name)


def test_question_longer_than_the_context(picture: str, model: list[str], capsys: Capture) -> None:
    assert main(["ask", picture, "why? " * 400, *model]) == 1
    assert_one_line(capsys.readouterr(), "tokens", "the context holds 256")
    assert main(["caption", picture, "--prompt", "why? " * 400, *model]) == 1
    assert_one_line(capsys.readouterr(), "the context holds 256")


@pytest.mark.parametrize(
    "option",
    [
        ("--top-p", "7"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--num-beams", "0"),
        ("--max-new-tokens", "0"),
        ("--top-k", "-2"),
        ("--stop", ""),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--temperature", "1e-45"),
        ("--device", "tpu"),
        ("--device", "cuda:99"),
    ],
)
def test_impossible_option(option: tuple[str, str], picture: str, model: list[str], capsys: Capture) -> None:
    assert main(["ask", picture, "What?", *model, *option]) == 1
    what = option[1] if option[0] == "--device" else option[0].strip("-").replace("-", "_")
    assert_one_line(capsys.readouterr(), what)


def test_beams_do_not_sample(picture: str, model: list[str], capsys: Capture) -> None:
    assert main(["ask", picture, "What?", *model, "--num-beams", "2", "--temperature", "1"]) == 1
    assert_one_line(capsys.readouterr(), "beam search does not sample")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the user's mistakes are one line; hiding our own would make them impossible to report."""

    def broken(args: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "models", dataclasses.replace(COMMANDS["models"], run=broken))
    with pytest.raises(RuntimeError):
        main(["models"])


def test_ctrl_c_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt("stopped after step 3; continue with --resume")

    monkeypatch.setitem(COMMANDS, "models", dataclasses.replace(COMMANDS["models"], run=interrupted))
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "mm-gpt: stopped after step 3; continue with --resume\n"


def test_closed_pipe_is_quiet(picture: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """`mm-gpt caption ... | head` ends without a traceback, also not at the interpreter's exit."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = open(writer, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["caption", picture, *model]) == 141
    stdout.close()  # flushes, as the exit does
    assert "Error" not in capsys.readouterr().err


# ---- ask ----


def test_ask(picture: str, model: list[str], tiny_model_folder: Path, capsys: Capture) -> None:
    expected = mm_gpt.load(tiny_model_folder).ask([picture, picture], "Which?", max_new_tokens=12)
    assert main(["ask", picture, picture, "Which?", *model]) == 0
    assert capsys.readouterr() == (f"{expected}\n", "")
    # An option between image and question, and a question that begins with a dash.
    assert main(["ask", picture, *model, picture, "Which?"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["ask", *model, picture, "--", "-5?"]) == 0
    assert capsys.readouterr().err == ""


def test_short_names_that_people_type(picture: str, tiny_model_folder: Path, capsys: Capture) -> None:
    assert main(["ask", picture, "What?", "-m", str(tiny_model_folder), "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completion_tokens"] == 3
    assert main(["caption", picture, "-m", str(tiny_model_folder), "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == picture
    for argv in (["-V"], ["--version"], ["help"], ["help", "ask"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count(f"mm-gpt {mm_gpt.__version__}\n") == 2
    assert "usage: mm-gpt ask" in printed


def test_ask_reads_standard_input(
    picture: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    main(["ask", picture, "What?", *model])
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(picture).read_bytes())))
    assert main(["ask", "-", "What?", *model]) == 0
    assert capsys.readouterr().out == expected
    give_stdin(monkeypatch, "What?\n")
    assert main(["ask", picture, "-", *model]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    assert main(["ask", "-", "What?", *model]) == 1
    assert_one_line(capsys.readouterr(), "standard input")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), encoding="utf-8"))
    assert main(["ask", picture, "-", *model]) == 1
    assert_one_line(capsys.readouterr(), "standard input", "utf-8")


def test_ask_without_image_as_json(model: list[str], capsys: Capture) -> None:
    assert main(["ask", "Who are you?", "--json", *model]) == 0
    values = json.loads(capsys.readouterr().out)
    counts = ["prompt_tokens", "image_tokens", "completion_tokens", "finish_reason"]
    assert list(values) == ["answer", *counts, "generation"]
    assert values["generation"] == dataclasses.asdict(
        mm_gpt.GenerationConfig(max_new_tokens=12, no_repeat_ngram_size=8)
    ) | {"stop": []}
    assert values["image_tokens"] == 0
    assert 1 <= values["completion_tokens"] <= 12


def test_ask_options_reach_the_model(picture: str, model: list[str], capsys: Capture) -> None:
    def ask(*options: str) -> dict[str, Any]:
        assert main(["ask", picture, "What?", "--json", *model, *options]) == 0
        return json.loads(capsys.readouterr().out)

    greedy = ask()
    hot = ["--temperature", "5", "--top-p", "0.99", "--top-k", "300"]
    assert ask(*hot, "--seed", "1") == ask(*hot, "--seed", "1")
    assert ask(*hot, "--seed", "1") != ask(*hot, "--seed", "2")
    assert ask("--max-new-tokens", "3")["completion_tokens"] == 3
    assert ask("--num-beams", "4")["answer"] != greedy["answer"]
    middle = greedy["answer"][4:6]
    assert ask("--stop", middle, "--stop", "zzzz")["answer"] == greedy["answer"].partition(middle)[0].strip()


def test_terminal_sees_the_same_answer_in_pieces(
    picture: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    main(["ask", picture, "What?", *model])
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pieces = []
    monkeypatch.setattr(ask_command, "print", lambda *a, end="\n", **_: pieces.append("".join(a) + end), raising=False)
    assert main(["ask", picture, "What?", *model]) == 0
    assert len(pieces) > 3
    assert "".join(pieces).strip() == whole.strip()


# ---- chat ----


def test_chat_remembers_until_reset(
    picture: str, model: list[str], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Turns build on each other, an image goes with the next question only, and /reset forgets both."""
    give_stdin(monkeypatch, f"/image {picture}\nWhat?\n\nMore?\n/reset\nMore?\n/quit\nnever\n")
    assert main(["chat", *model]) == 0
    assistant = mm_gpt.load(tiny_model_folder)
    first = [{"role": "user", "content": [mm_gpt.Image(picture), "What?"]}]
    answers = [assistant.chat(first, max_new_tokens=12)]
    more = {"role": "user", "content": ["More?"]}
    second = [*first, {"role": "assistant", "content": answers[0].text}, more]
    answers += [assistant.chat(second, max_new_tokens=12), assistant.chat([more], max_new_tokens=12)]
    printed = capsys.readouterr()
    assert printed.out.split() == " ".join(answers).split()
    assert printed.err == ""


def test_chat_goes_on_after_a_mistake(
    picture: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_stdin(monkeypatch, f"/image nope.jpg\n/imgae x\n{'why? ' * 400}\nWhat?")
    assert main(["chat", picture, *model]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 3
    assert "nope.jpg" in printed.err
    assert "did you mean '/image'?" in printed.err
    assert "the context holds" in printed.err
    main(["ask", picture, "What?", *model])
    assert printed.out.strip() == capsys.readouterr().out.strip()  # the picture still waits for its question


def test_ctrl_c_ends_the_answer_not_the_chat(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_stdin(monkeypatch, "One?\nTwo?\n")
    print_stream, calls = ask_command.print_stream, []

    def interrupted_once(stream: Any) -> None:
        calls.append(stream)
        if len(calls) == 1:
            next(stream)
            raise KeyboardInterrupt
        print_stream(stream)

    monkeypatch.setattr(ask_command, "print_stream", interrupted_once)
    assert main(["chat", *model]) == 0
    assert len(calls) == 2
    printed = capsys.readouterr()
    assert "(stopped)" in printed.err
    assert printed.out.strip()


# ---- caption ----


def test_caption_to_stdout_and_to_a_file(picture: str, model: list[str], capsys: Capture) -> None:
    make_picture(1).save('comma, quote".png')
    assert main(["caption", "*.png", *model, "--batch-size", "1"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["image"] for row in rows] == ['comma, quote".png', "picture.png"]
    settings = "num_beams 3, temperature 0.0, max_new_tokens 12, no_repeat_ngram_size 3"
    assert printed.err == f"mm-gpt: generated with {settings}\nmm-gpt: done 2 of 2, errors 0\n"
    assert main(["caption", ".", "-o", "out.jsonl", *model]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == rows
    assert main(["caption", ".", "-o", "out.jsonl", *model]) == 0
    assert "done 2 of 2 (2 from before), errors 0" in capsys.readouterr().err


def test_caption_counts_what_it_leaves_out_and_takes_threads(
    picture: str, model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    Path("notes.txt").write_text("a cat")
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    counts: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    assert main(["caption", ".", *model, "--threads", "3"]) == 0
    assert counts == [3]
    assert capsys.readouterr().err.endswith("mm-gpt: done 1 of 1, errors 0; left out: 1 .heic, 1 .txt\n")
    assert main(["caption", "notes.txt", "photo.heic", picture, *model]) == 3  # as a shell expands *
    captured = capsys.readouterr()
    assert "HEIC is not read" in json.loads(captured.out.splitlines()[0])["error"]
    assert captured.err.endswith("mm-gpt: done 2 of 2, errors 1; left out: 1 .txt\n")


def test_errors_of_an_earlier_run_still_count(picture: str, model: list[str], capsys: Capture) -> None:
    """A run that was continued must end with the same exit code as one that was not interrupted."""
    Path("broken.png").write_bytes(b"")
    for _ in range(2):
        assert main(["caption", ".", "-o", "out.csv", *model]) == 3
    make_picture(3).save("broken.png")
    assert main(["caption", ".", "-o", "out.csv", "--retry-errors", *model]) == 0
    assert "errors 0" in capsys.readouterr().err


def test_output_that_cannot_be(picture: str, model: list[str], capsys: Capture) -> None:
    for out in ("captions.txt", "no/such/folder.csv", "picture.png"):
        assert main(["caption", picture, "-o", out, *model]) == 1
        assert_one_line(capsys.readouterr(), out)


# ---- train, eval, demo, models ----


@dataclasses.dataclass(frozen=True)
class FakeRecipe:
    data: str
    steps: int = 10


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The only recipe besides the presets is a small one, which is not run but returned here."""
    monkeypatch.chdir(tmp_path)
    runs: list[Any] = []

    def small(data: str) -> FakeRecipe:
        """A small run.

        More about it.
        """
        return FakeRecipe(data)

    module = importlib.import_module("mm_gpt.training.recipes")
    monkeypatch.setattr(module, "RECIPES", {"small": small})
    monkeypatch.setattr(
        module, "run_recipe", lambda recipe, out, *, resume, progress: runs.append((recipe, out, resume))
    )
    return runs


def test_train(recipes: list[Any], capsys: Capture) -> None:
    assert main(["train", "small"]) == 0
    assert main(["train", "small", "--data", ".", "steps=30", "--out", "r", "--resume"]) == 0
    assert main(["train", "small", "--out", "r", "steps=40"]) == 0
    assert recipes == [
        (FakeRecipe("."), Path("runs/small"), False),
        (FakeRecipe(".", 30), Path("r"), True),
        (FakeRecipe(".", 40), Path("r"), False),
    ]
    capsys.readouterr()
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == ["small", "A small run."]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["smal"], "did you mean 'small'?"),
        (["small", "stpes=3"], "did you mean 'steps'?"),
        (["small", "steps=x"], "steps: cannot read 'x' as int"),
        (["small", "steps"], "'steps' is not of the form key=value"),
        (["small", "--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_train_mistakes(argv: list[str], said: str, recipes: list[Any], capsys: Capture) -> None:
    assert main(["train", *argv]) == 1
    assert_one_line(capsys.readouterr(), said)
    assert not recipes


def test_recipes_of_the_package_are_listed(capsys: Capture) -> None:
    from mm_gpt.model.presets import PRESETS
    from mm_gpt.training.recipes import RECIPES

    assert main(["train", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*RECIPES, *PRESETS]


def test_eval_is_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_gpt.eval import harness

    monkeypatch.setattr(harness, "run", lambda args: 7 if args.task == "vqa" else 0)
    assert main(["eval", "--task", "vqa", "--data", "."]) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "nofile.json"], "nofile.json: not readable as JSON (No such file or directory)"),
        (["--json-schema", "{schema}"], "schema.json: not readable as JSON (Expecting property"),
        (["--choice", ""], "choices: needs at least one text"),
        (["--min-p", "2"], "min_p cannot be 2.0"),
        (["--presence-penalty", "-3"], "presence_penalty cannot be -3.0"),
    ],
)
def test_forms_and_penalties_are_checked_before_a_model_is_loaded(
    options: list[str], message: str, no_model: None, picture: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "schema.json").write_text("{")
    words = [word.format(schema=tmp_path / "schema.json") for word in options]
    assert main(["ask", picture, "What?", *words]) == 1
    assert_one_line(capsys.readouterr(), message)


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    launched = []
    module = ModuleType("gradio_demo")
    module.launch = lambda *args: launched.append(args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mm_gpt.serving.gradio_demo", module)
    assert main(["demo", "--port", "8000", "--model", "m"]) == 0
    assert launched == [("m", "127.0.0.1", 8000, "auto", "auto")]
    monkeypatch.delitem(sys.modules, "mm_gpt.serving.gradio_demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 1
    assert_one_line(capsys.readouterr(), "Gradio is not installed", 'pip install -e ".[demo]"')


def test_models(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from mm_gpt.hub.fetching.registry import REGISTRY

    shutil.copytree(tiny_model_folder, tmp_path / "shipped" / "default")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path))
    (file,) = REGISTRY["efficientnet-lite0"].files
    with (tmp_path / file.name).open("wb") as sparse:
        sparse.truncate(file.size_bytes)
    assert main(["models"]) == 0
    first, *others = capsys.readouterr().out.split("\n\n")
    lines = first.splitlines()
    assert len(lines) == 2 + len(REGISTRY)
    assert lines[1].startswith("default ")
    assert {line.split()[0] for line in lines if "in the cache" in line} == {"efficientnet-lite0"}
    assert sum("Apache-2.0" in line for line in lines) == len(REGISTRY)
    assert any("HuggingFaceTB/SmolVLM-256M-Instruct " in table for table in others)
    assert any("LlavaNextForConditionalGeneration" in table for table in others)
