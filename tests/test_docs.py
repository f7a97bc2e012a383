"""The commands and the Python in README.md and docs/ run as they stand, in a copy of what a user has checked out."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

from mm_gpt.errors import DownloadError
from mm_gpt.hub.fetching import download
from mm_gpt.hub.public import tables
from mm_gpt.model.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = (
    "python3 -m venv",  # .ci/run runs it
    "mm-gpt demo",  # test_gradio_demo.py runs it
    "mm-gpt serve",  # test_server_process.py runs it
    "apt-get",
    "python examples/english_text.py",  # needs the Debian package that apt-get fetches
    "python examples/photo_set.py",  # downloads packages; test_photo_set.py runs its parts
    "python examples/alignment/",  # minutes each; test_alignment_examples.py and test_refusals.py run them small
    "python examples/literature/",  # minutes each; test_literature.py runs them small
    "mm-gpt scaling",  # hours; test_scaling_commands.py runs a plan to its verdict
    "python examples/scaling/",  # minutes, and packages of Debian; test_ladder.py runs its parts
    "git add predictions",
    "python examples/benchmarks",  # minutes, and its result is a matter of the machine
    "python examples/quantisation_quality.py",  # minutes; test_quantisation_quality.py runs its parts
    "pip install",
    "python examples/debian_corpora.py",  # downloads 400 MB; test_debian_corpora.py runs its parts
    "python examples/multilingual_tokenizer.py",  # needs those corpora
    "mm-gpt corpus build 's3://crawl/",
    "mm-gpt train kosmos-1 --data corpora",
    "mm-gpt train gpt3-125m --data corpus train.steps=620000",  # 300 billion tokens
    "torchrun",
    # From the hub: test_repository.py runs such commands with a server of its own.
    "mm-gpt ask --model smolvlm",
    "mm-gpt rules fit gold.jsonl --grader smolvlm",  # test_rule_commands.py fits with graders of its own
    "mm-gpt caption --model llava-onevision",
    "mm-gpt chat --model qwen3",
    "mm-gpt train finetune --data my-photos/ start=HuggingFaceTB",
)
SHORTER = {  # what makes an hour's training a step, and a minute's, which test_recipes.py has, some seconds
    "python examples/make_shapes.py shapes": "--count 32",
    "mm-gpt train tiny": "train.steps=10 train.validate_every=10 train.save_every=10",
    "mm-gpt train finetune": "train.accumulate=1 validation_images=4 rows=1 row_length=256",
    "mm-gpt train default_vision": "train.steps=1 batch_size=4 validation_images=4",
    "mm-gpt train default_joint": "train.steps=1 compile=false rows=1 row_length=256 validation_images=2",
    "mm-gpt train default_questions": "train.steps=1 compile=false rows=1 row_length=256 validation_images=2",
    "mm-gpt train default_concepts": "train.steps=1 compile=false rows=1 row_length=256 validation_images=2",
    "mm-gpt train default_critical": "train.steps=1 photos=1 samples=2 max_new_tokens=4 validation_images=2",
    "mm-gpt train sft": "train.steps=4 rows=1 row_length=256 validation_images=2",
    "mm-gpt train reward": "train.steps=4 comparisons=2",
    "mm-gpt train ppo": "train.steps=2 prompts=4 max_new_tokens=6 validation_prompts=2",
    "mm-gpt train grpo": "train.steps=1 prompts=1 samples=2 max_new_tokens=4 validation_prompts=2",
    "mm-gpt train dpo": "train.steps=1 batch_size=1 validation_comparisons=2",
    "mm-gpt train kto": "train.steps=1 batch_size=2 validation_comparisons=2",
    "mm-gpt train distill": "train.steps=1 rows=1 row_length=256 validation_images=2",
    "mm-gpt train gpt2-small": "train.steps=1 model.decoder.num_layers=1 model.decoder.vocab_size=600",
    "mm-gpt train default": "train.steps=1 compile=false rows=1 row_length=256 validation_images=2",
}


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "" for plain ones."""
    found: list[list[str]] = []
    inside: str | None = None
    for line in document.read_text().splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = line[3:]
                if inside == language:
                    found.append([])
            else:
                inside = None
        elif inside == language:
            found[-1].append(line)
    return ["\n".join(lines) + "\n" for lines in found]


def commands(document: Path, language: str) -> list[str]:
    """What users type: the lines of ```bash blocks, and of plain ones, which need data of the user's own."""
    shown = [b for b in blocks(document, language) if language or b.startswith(("mm-gpt ", "python "))]
    lines = [line for block in shown for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


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


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The commands that were run in the checkout, and what they made is there."""
    return set()


def write_data(folder: Path) -> None:
    """Tars of the names and the form that the default model's recipes read, with a few photos each."""
    photos = [path.read_bytes() for path in sorted((ROOT / "mm_gpt/serving/samples").glob("*.jpg"))]
    captions = {"captions": ["A brown dog runs .", "Two dogs on the grass .", "A dog ."]}
    asked = {"qa": [{"question": "what is it?", "answer": "cat"}, {"question": "There is a box.", "answer": "true"}]}
    named = {"class": 281, "name": "tabby cat", "licence": "CC0-1.0", "source": "photos 1 cat.jpg", **asked}
    for name, about in {
        "flickr8k/train-000000.tar": captions,
        "flickr8k/train-000001.tar": captions,
        "flickr8k/val-000000.tar": captions,
        "coco2017_mini/train-000000.tar": captions,
        **{
            f"{task}/{split}-000000.tar": asked
            for task in ("daquar", "easy_vqa", "nlvr1")
            for split in ("train", "val")
        },
        "../photos.tar": named,  # of examples/photo_set.py
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / name, "w") as tar:
            for number, photo in enumerate(photos):
                for suffix, data in (("jpg", photo), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_comparisons(folder / "comparisons", photos)


def write_comparisons(folder: Path, photos: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    rows = []
    for number, photo in enumerate(photos):
        (folder / f"{number}.jpg").write_bytes(photo)
        for question in ("What is it?", "What colour is it?", "What is in the picture?"):
            prompt = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            answers = {name: [{"role": "assistant", "content": f"A {name} thing."}] for name in ("chosen", "rejected")}
            rows.append({"images": [f"{number}.jpg"], "prompt": [prompt], **answers, "truth": "red circle"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    for beginning, overrides in SHORTER.items():
        if command.split()[:3] == beginning.split():
            command = f"{command} {overrides}"
    command, _, given = command.partition(" < ")
    words = shlex.split(command)
    scripts = Path(sysconfig.get_path("scripts"))
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable if word == "python" else word for word in words]
    stdin = (folder / given).read_bytes() if given else b"What is it?\n"
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, input=stdin)
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_commands_run(document: Path, checkout: Path, done: set[str]) -> None:
    run_all(commands(document, "bash"), checkout, done)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_commands_on_data_of_their_own_run(document: Path, checkout: Path) -> None:
    write_data(checkout / "DATA")
    (checkout / "DATA/texts").mkdir(exist_ok=True)
    (checkout / "DATA/texts/cat.txt").write_text("The cat sat on the mat, and looked at the dog.\n" * 400)
    (checkout / "english.txt").write_text("The cat sat on the mat, and looked at the dog.\n" * 40)
    run_all(commands(document, ""), checkout, set())


def run_all(lines: list[str], folder: Path, done: set[str]) -> None:
    """Each once: what another page has run already, with its results still there, is not run again."""
    for line in lines:
        if line in done:
            continue
        if out := re.search(r" --out \S+", line):
            shutil.rmtree(folder / out[0].split()[1], ignore_errors=True)
            done -= {other for other in done if f"{out[0]} " in f"{other} "}
        found = run(line, folder)
        assert found.returncode == 0, f"{line}\n{found.stderr[-2000:]}"
        done.add(line)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_python_runs(document: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    if code := "\n".join(blocks(document, "python")):
        exec(compile(code, document.name, "exec"), {"__name__": document.stem})


def test_links_lead_somewhere() -> None:
    for document in DOCS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_tables_of_models_are_those_of_the_command() -> None:
    text = (ROOT / "docs/models.md").read_text()
    for table in tables().values():
        for row in table[1:]:
            assert f"| {' | '.join(row)} |" in text
    for name, preset in PRESETS.items():
        assert re.search(rf"^\| {re.escape(name)} \| [\d,]+ \| .* \| {re.escape(preset.about)} \|$", text, re.M)


def test_the_first_command_installs_what_the_readme_uses() -> None:
    """And no page names a package of an index: a stranger could register it."""
    (first, *_) = blocks(ROOT / "README.md", "bash")
    assert 'pip install -e ".[all]"' in first
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["all"] == ["mm-gpt[demo,serve,corpus]"]
    for place in (*DOCS, *ROOT.glob("mm_gpt/**/*.py"), *ROOT.glob("datasets/**/*.py"), *ROOT.glob("examples/**/*.py")):
        assert not re.search(r'pip install "?mm-gpt', place.read_text(encoding="utf-8")), place


def test_the_map_names_what_is_there() -> None:
    """Folders in the tables of README.md and CONTRIBUTING.md, and the rooms of datasets/."""
    rooms = {path.name for path in (ROOT / "datasets").iterdir() if (path / "__init__.py").exists()}
    for page in ("README.md", "CONTRIBUTING.md"):
        rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
        paths = [
            path for row in rows for path in re.findall(r"`((?:mm_gpt|vision|datasets|eval|examples)/[\w./]*)`", row)
        ]
        assert len(paths) >= 8
        assert [path for path in paths if not (ROOT / path).exists()] == []
        text = "\n".join(rows)
        assert {room for room in rooms if f"`{room}`" not in text and f"`{room}/`" not in text} == set()


def test_readme_has_the_two_commands() -> None:
    """.ci/run greps the second one."""
    lines = blocks(ROOT / "README.md", "bash")
    assert lines[0].startswith("python3 -m venv .venv && ")
    assert lines[0].count("\n") == 1
    assert lines[1].strip().endswith("-m pytest")
    assert lines[1].count("\n") == 1
