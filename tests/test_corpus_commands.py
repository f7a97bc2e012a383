"""`mm-gpt corpus ...` on real folders: what goes to stdout, what to stderr, and exit codes."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_gpt.commands.cli import main
from mm_gpt.commands.corpus import describe
from mm_gpt.config import field_docs
from mm_gpt.datasets.sources import FORMATS
from mm_gpt.document import Document, Image, Text
from mm_gpt.tokenizer import Tokenizer

SENTENCES = [
    "The ferry to the island leaves at nine in the morning and comes back before the sun sets behind the hills.",
    "Nobody had expected the old clock on the tower to strike again after thirty years of silence in the square.",
    "A good pair of boots will carry you over the pass, but take a warm coat with you for the nights up there.",
    "Seventeen purple elephants waltzed slowly across the frozen parliament square while tired clockmakers sang along.",
]
CAPTIONS = ["A quiet harbour with boats.", "The clock on a tower.", "Boots on a mountain path.", SENTENCES[3]]


def picture(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    PILImage.fromarray(small).resize((64, 48), PILImage.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Texts in JSON lines, the last of them no JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES[:3]) + "{broken\n")
    return path


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number, text in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(text)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    capsys.readouterr()
    code = main(["corpus", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_build_and_show(rows: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings may stand anywhere; the table goes to stdout, all that is for people to stderr."""
    out = tmp_path / "corpus"
    code, table, said = run(
        capsys, "build", "languages=en", rows, "--out", out, "filters=basic", captioned, "--workers", 1, "shard_mb=8"
    )
    assert code == 0
    assert table.startswith("| step | documents in | out |")
    assert "| written | 7 | 7 | 4 | 4 |" in table
    assert f"7 documents with 4 images and {sum(map(len, SENTENCES[:3] + CAPTIONS))} characters" in said
    assert f"in 1 shards: {out}" in said
    assert "1 records skipped" in said or "1 record skipped" in said
    assert "rows.jsonl:4" in said
    assert table == (out / "funnel.md").read_text()
    config = json.loads((out / "corpus.json").read_text())["config"]
    assert (config["languages"], config["shard_mb"]) == (["en"], 8)

    code, shown, said = run(capsys, "show", out, "-n", 2)
    assert code == 0
    assert shown.count("=== ") == 2
    assert SENTENCES[1] in shown
    assert SENTENCES[2] not in shown
    assert "7 samples in 1 shards (7 documents, 4 images" in said
    code, shown, _ = run(capsys, "show", captioned, "-n", 1)
    assert (code, shown.count("<image 64 x 48>")) == (0, 1)
    assert "[record]" in shown
    assert run(capsys, "show", captioned, "-n", -1)[:2] == (0, "")

    code, _, said = run(capsys, "build", rows, "--out", out, "--workers", 1)
    assert code == 1
    assert said.count("\n") == 1
    assert "already holds a corpus" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["filter=basic"], "unknown key 'filter'; did you mean 'filters'?"),
        (["filters=obelic"], "did you mean 'obelics'"),
        (["shard_mb=many"], "shard_mb: cannot read 'many' as int"),
        (["near_duplicates=2"], "near_duplicates must be above 0 and at most 1, not 2"),
        (["--format", "txt"], "unknown format 'txt'; did you mean 'text'"),
        (["--workers", "0"], "workers must be at least 1, not 0"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["filters=obelics", "languages=de"], "give stop_words of the languages de"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is made: the folder stays free for the right command."""
    code, out, said = run(capsys, "build", rows, "--out", tmp_path / "corpus", *words)
    assert (code, out) == (1, "")
    assert message in said
    assert len(said.strip().split("\n")) == 1
    assert not (tmp_path / "corpus").exists()


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is exit code 2; help lists every setting with its default."""
    with pytest.raises(SystemExit) as wrong:
        run(capsys, "build", "source")
    assert wrong.value.code == 2
    code, _, said = run(capsys, "build", "filters=none", "--out", tmp_path / "corpus")
    assert code == 1
    assert "name at least one source" in said
    with pytest.raises(SystemExit) as done:
        run(capsys, "build", "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for setting in ("filters=basic", "near_duplicates=0.8", "image_side=1024", "opt_out=True", "shard_mb=256"):
        assert setting in text
    assert "none, basic, kosmos, obelics" in text
    # what stands under each field in the source
    assert "Fetch images behind URLs, from public addresses only; false: they are left out." in text
    assert "Documents whose words agree by more than this are one (0 to 1, by MinHash)." in text
    with pytest.raises(SystemExit) as unknown:
        run(capsys, "bild", "x")
    assert unknown.value.code == 2
    assert "did you mean 'corpus build'" in capsys.readouterr().err


def test_paths_that_look_like_settings(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file `a=b.jsonl` is a source, not a setting."""
    (tmp_path / "year=2024").mkdir()
    rows.rename(tmp_path / "year=2024" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert main(["corpus", "build", "year=2024", "--out", "corpus", "--workers", "1"]) == 0


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, on stdout."""
    code, out, said = run(capsys, "formats")
    assert (code, said) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(FORMATS)


def test_tokenizer(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned from a corpus with languages; every text comes back from its ids."""
    german = ["Der Zug nach Hamburg fährt heute von einem anderen Gleis ab, weil der Bahnsteig gesperrt ist."]
    texts = tmp_path / "german.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in german))
    corpus, out = tmp_path / "corpus", tmp_path / "tokenizer"
    assert run(capsys, "build", rows, texts, "--out", corpus, "--workers", 1)[0] == 0
    code, data, said = run(capsys, "tokenizer", corpus, "--out", out, "--vocab-size", 300)
    assert code == 0
    assert data.splitlines() == [
        f"de  {len(german[0])} characters",
        f"en  {sum(map(len, SENTENCES[:3]))} characters",
    ]
    assert "300 ids" in said
    tokenizer = Tokenizer.from_hf_folder(out)
    assert tokenizer.vocab_size == 300
    for text in [*SENTENCES, *german]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    before = (out / "tokenizer.json").read_bytes()
    run(capsys, "tokenizer", corpus, "--out", out, "--vocab-size", 300)
    assert (out / "tokenizer.json").read_bytes() == before, "the same corpus, the same tokenizer"

    code, data, said = run(capsys, "tokenizer", corpus, "--out", out, "--vocab-size", 100)
    assert (code, data) == (1, "")
    assert "at least 259" in said
    assert run(capsys, "tokenizer", corpus, "--out", out, "--characters", 0)[0] == 1
    assert run(capsys, "tokenizer", corpus, "--out", out, "--alpha", 2)[0] == 1
    (tmp_path / "file").write_text("")
    code, _, said = run(capsys, "tokenizer", tmp_path / "nowhere", "--out", out)
    assert code == 1
    assert "nowhere" in said


def test_contamination(captioned: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the evaluation set is found, told, and gone from the corpus that is built with the index."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "one.png").write_bytes(picture(0))
    (tests / "one.txt").write_text(SENTENCES[3])
    found = tmp_path / "found"
    code, table, _ = run(capsys, "contamination", captioned, rows, "--eval", f"captioning={tests}", "--out", found)
    assert code == 0
    assert "captioning" in table
    assert json.loads((found / "contamination.json").read_text())
    code, table, _ = run(
        capsys, "build", captioned, "--out", tmp_path / "corpus", "--workers", 1, f"contamination={found / 'index'}"
    )
    assert code == 0
    assert "in an evaluation set: 2" in table
    assert "| written | 2 | 2 | 2 | 2 |" in table

    code, out, said = run(capsys, "contamination", captioned, "--eval", f"captions={tests}", "--out", found)
    assert (code, out) == (1, "")
    assert "unknown task 'captions'; did you mean 'captioning'?" in said
    code, _, said = run(capsys, "contamination", captioned, "--eval", "captioning", "--out", found)
    assert code == 1
    assert "is not of the form TASK=DATA" in said
    code, _, said = run(
        capsys, "build", captioned, "--out", tmp_path / "other", "--workers", 1, f"contamination={tmp_path / 'no'}"
    )
    assert code == 1
    assert str(tmp_path / "no") in said


def test_show_does_not_let_text_command_the_terminal() -> None:
    """Escape sequences and halves of characters come from strangers."""
    shown = describe(Document((Text("red \x1b[31m\x9b text\ttab\nline \ud800"), Image(b"no image")), id="x"))
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "text\ttab\nline" in shown
    shown.encode()
    assert "<bytes, 8 long>: not a JPEG" in shown


def test_fields_tell_what_stands_under_them() -> None:
    assert field_docs(Documented) == {"first": "What it is, on two lines.", "third": "The last."}


@dataclass
class Documented:
    """Not of a field."""

    first: int = 1
    """What it is,
    on two lines."""
    second: int = 2
    third: tuple[int, ...] = ()
    """The last."""

    def method(self) -> None:
        """Not of a field."""
