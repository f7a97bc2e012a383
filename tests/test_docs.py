"""The commands and the Python in README.md and docs/ run as they stand, in a copy of what a user has checked out."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mm_gpt.errors import DownloadError
from mm_gpt.hub import download

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = ("python3 -m venv", "apt-get")  # .ci/run runs the first
SERVERS = ("mm-gpt demo",)  # test_gradio_demo.py runs it


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    lines = [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith((*SETUP, *SERVERS))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and sample photos, and the decoder's weights in the cache."""
    try:
        download.fetch("smollm2-135m-instruct")
    except DownloadError as error:
        pytest.skip(f"the default model's decoder is out of reach: {error}")
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "mm_gpt/serving/samples", folder / "mm_gpt/serving/samples")
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    scripts = Path(sysconfig.get_path("scripts"))
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    words = [sys.executable if word == "python" else word for word in words]
    return subprocess.run(words, cwd=folder, env=environment, text=True, capture_output=True, input="What is it?\n")


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_commands_run(document: Path, checkout: Path) -> None:
    for command in commands(document):
        done = run(command, checkout)
        assert done.returncode == 0, f"{document.name}: {command}\n{done.stderr[-2000:]}"
    shutil.rmtree(checkout / "runs", ignore_errors=True)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_python_runs(document: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    if code := "\n".join(blocks(document, "python")):
        exec(compile(code, document.name, "exec"), {"__name__": document.stem})


def test_links_lead_somewhere() -> None:
    for document in DOCS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_readme_has_the_two_commands() -> None:
    """.ci/run greps the second one."""
    lines = blocks(ROOT / "README.md", "bash")
    assert lines[0].startswith("python3 -m venv .venv && ")
    assert lines[0].count("\n") == 1
    assert lines[1].strip().endswith("-m pytest")
    assert lines[1].count("\n") == 1
