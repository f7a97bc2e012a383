"""Which model is meant: short names, one's own default; and what is told where the packaged model is asked too much."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_picture

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub import checkpoint, choice
from mm_gpt.hub.checkpoint import decoder_names, model_folder, shipped_models
from mm_gpt.hub.choice import VARIABLE, chosen_model, set_default, settings_file
from mm_gpt.hub.fetching.repository import is_repository_name
from mm_gpt.hub.public import PUBLIC_MODELS, SHORT_NAMES, long_name
from mm_gpt.inference.hints import WORDS, Hints, beyond, known_words
from mm_gpt.serving.gradio_demo import EXAMPLES, build
from mm_gpt.templates.prompts import CAPTION_PROMPT, OTHER_CAPTION_PROMPTS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    monkeypatch.delenv(VARIABLE, raising=False)


def write_settings(text: str) -> Path:
    path = settings_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- short names ----


def test_short_names_are_names() -> None:
    assert len(SHORT_NAMES) == len(PUBLIC_MODELS) == len({model.repository for model in PUBLIC_MODELS})
    for name, repository in SHORT_NAMES.items():
        assert is_repository_name(repository)
        assert not is_repository_name(name)
        assert name not in (*shipped_models(), *decoder_names())
        assert long_name(name) == repository
    assert long_name("owner/name") == "owner/name"
    assert long_name(Path("smolvlm")) == Path("smolvlm")


def test_a_short_name_is_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    """Whatever lies in the working directory; a folder of that name is ./smolvlm."""
    fetched: list[str] = []
    monkeypatch.setattr(checkpoint, "fetch_repository", lambda name, check: fetched.append(name) or tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "smolvlm")
    assert model_folder("smolvlm") == tiny_model_folder
    assert fetched == ["HuggingFaceTB/SmolVLM-256M-Instruct"]
    assert model_folder("./smolvlm") == Path("smolvlm")
    assert model_folder(Path("smolvlm")) == Path("smolvlm")
    assert len(fetched) == 1


@pytest.mark.parametrize(
    ("name", "meant"), [("smolvml", "smolvlm"), ("gemma-3", "gemma3"), ("Qwen2.5-VL", "qwen2.5-vl")]
)
def test_a_wrong_name_has_a_right_one(name: str, meant: str, capsys: Capture) -> None:
    with pytest.raises(MMGPTError, match=f"unknown model '{name}'; did you mean '{meant}'"):
        mm_gpt.load(name)
    assert main(["ask", "--model", name, "Hello"]) == 1
    assert f"did you mean '{meant}'" in capsys.readouterr().err


# ---- one's own default ----


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    """The argument, the variable, the setting, the packaged model; in Python and in every command."""
    assert chosen_model() == "default"
    write_settings('model = "gemma3"\n')
    assert chosen_model() == "gemma3"
    monkeypatch.setenv(VARIABLE, "smolvlm-500m")
    assert chosen_model() == "smolvlm-500m"
    monkeypatch.setenv(VARIABLE, str(tiny_model_folder))
    mine = mm_gpt.load(device="cpu")
    assert mine.model.config.vision is not None
    assert mine.model.config.vision.image_size == 32
    with pytest.raises(MMGPTError, match="no such model folder"):
        mm_gpt.load("elsewhere/nothing/here", device="cpu")
    make_picture(0).save(tmp_path / "a.png")
    ask = ["ask", str(tmp_path / "a.png"), "What?", "--max-new-tokens", "2", "--device", "cpu"]
    assert main(ask) == 0
    monkeypatch.setenv(VARIABLE, "no-such-model")
    assert main([*ask, "--model", str(tiny_model_folder)]) == 0


def test_all_commands_take_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setenv(VARIABLE, "smolvml")
    make_picture(0).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    for command in (
        ["ask", picture, "What?"],
        ["chat"],
        ["caption", picture],
        ["demo"],
        ["eval", "--task", "captioning", "--data", picture],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("mm-gpt: error: MM_GPT_MODEL: unknown model 'smolvml'; did you mean 'smolvlm'?")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('modle = "smolvlm"', "unknown key 'modle'; did you mean 'model'"),
        ('model = "smolvml"', "unknown model 'smolvml'; did you mean 'smolvlm'"),
        ("model = 3", "model"),
        ("model =", "not readable as TOML"),
        ("[model]\nname = 'smolvlm'", "model"),
    ],
)
def test_wrong_settings_name_the_file(text: str, said: str, capsys: Capture) -> None:
    path = write_settings(text)
    with pytest.raises(MMGPTError) as caught:
        chosen_model()
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert main(["ask", "Hello"]) == 1
    assert str(path) in capsys.readouterr().err


def test_settings_that_are_no_text() -> None:
    path = write_settings("")
    path.write_bytes(b"model = '\xff'")
    with pytest.raises(ConfigError, match=r"settings\.toml: not readable as TOML"):
        chosen_model()


def test_set_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, capsys: Capture) -> None:
    assert main(["models", "--set-default", "smolvlm"]) == 0
    assert chosen_model() == "smolvlm"
    assert main(["models"]) == 0
    assert f"Taken where none is named: smolvlm ({settings_file()})" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / 'a "folder" \\ of mine'
    shutil.copytree(tiny_model_folder, odd)
    set_default(odd.name)
    monkeypatch.chdir("/")
    assert chosen_model() == str(odd)  # found from anywhere
    assert main(["models", "--set-default", "smolvml"]) == 1
    assert "--set-default: unknown model 'smolvml'; did you mean 'smolvlm'" in capsys.readouterr().err
    assert chosen_model() == str(odd)
    set_default("default")
    assert chosen_model() == "default"
    monkeypatch.setenv(VARIABLE, "gemma3")
    assert main(["models", "--set-default", "smolvlm"]) == 0
    assert "MM_GPT_MODEL is set and comes first: gemma3" in capsys.readouterr().err


def test_a_wrong_file_is_not_replaced() -> None:
    path = write_settings('modell = "smolvlm"  # mine\n')
    with pytest.raises(ConfigError, match="unknown key 'modell'"):
        set_default("gemma3")
    assert path.read_text() == 'modell = "smolvlm"  # mine\n'


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(MMGPTError, match=r"settings\.toml: "):
        set_default("smolvlm")


def test_without_a_configuration_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.settings_file() == tmp_path / ".config/mm-gpt/settings.toml"


# ---- what the packaged model does not know ----

KNOWN = known_words(model_folder("default"))
OWN_QUESTIONS = [
    *EXAMPLES.values(),
    CAPTION_PROMPT,
    *OTHER_CAPTION_PROMPTS,
    "Is there a woman in the picture?",
    "What is this?",
    "What is the dog doing?",
    "What's the man wearing?",
    "Isn't that a dog?",
    "Who is this?",
    "Where?",
    "How old is the boy?",
    "What is the weather like?",
    "Is it day or night?",
    "Is the woman reading a book?",
    "Can you tell me what is happening here, please?",
    "How many stories does the building have?",
    "Could you count the dogs?",
    "Which animals are these?",
    "True or false: There is a box with a blue circle, a black circle and other items.",
    "what is on the left side of the white oven on the floor and on right side of the blue armchair?",
    "does the image not contain a circle?",
    "",
    "???",
]


@pytest.mark.parametrize("question", OWN_QUESTIONS)
def test_nothing_is_told_about_what_it_knows(question: str) -> None:
    assert beyond(question, 1, KNOWN) is None


@pytest.mark.parametrize(
    ("question", "images", "said"),
    [
        ("Is there a giraffe?", 1, "hardly met 'giraffe'"),
        ("What emotion does she show?", 1, "hardly met 'emotion'"),
        ("Was für ein Hund ist das?", 1, "hardly met 'für'"),
        ("What does the sign say?", 1, "cannot read"),
        ("What is written on the shirt?", 1, "cannot read"),
        ("Read the text.", 1, "cannot read"),
        ("Describe the image in detail.", 1, "a few words"),
        ("Write a story about the dog.", 1, "a few words"),
        ("What colour is the dog?", 2, "one picture at a time"),
    ],
)
def test_what_is_beyond_it(question: str, images: int, said: str) -> None:
    assert said in (beyond(question, images, KNOWN) or "")


def test_names_of_concepts_are_known(tmp_path: Path) -> None:
    """Stops: a hint that the model hardly met what its classifier tells it."""
    (tmp_path / WORDS).write_text("ball\n")
    concepts = {"names": ["Old English sheepdog", "jack-o'-lantern"], "kinds": ["dog", ""]}
    for vision, known in ((None, False), ({"concepts": None}, False), ({"concepts": concepts}, True)):
        folder = tmp_path / str(known) / str(vision is None)
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / WORDS, folder)
        (folder / "config.json").write_text(json.dumps({"vision": vision}))
        words = known_words(folder)
        assert beyond("Is there a ball?", 1, words) is None
        for question in ("Are there sheepdogs?", "Is this an old dog?", "Is there a lantern?"):
            assert (beyond(question, 1, words) is None) == known, question


def test_told_once_and_only_of_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hints = Hints("default")
    assert hints.about("Is there a giraffe?", 0) is None  # a chat without pictures
    assert hints.about("Is there a dog?", 1) is None
    told = hints.about("Is there a giraffe?", 1)
    assert told is not None
    assert "--model smolvlm" in told
    assert "\n" not in told
    assert hints.about("Is there a narwhal?", 1) is None
    monkeypatch.chdir(tmp_path)
    for other in ("smolvlm", "HuggingFaceTB/SmolVLM-256M-Instruct", "./default", str(tmp_path)):
        assert Hints(other).about("Is there a giraffe?", 1) is None


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> str:
    """A tiny model as the packaged one, with its words; the path of a picture."""
    words = model_folder("default") / WORDS
    shutil.copytree(tiny_model_folder, tmp_path / "shipped/default")
    shutil.copy(words, tmp_path / "shipped/default")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    make_picture(0).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_the_demo_tells_it_once(packaged: str, capsys: Capture) -> None:
    demo = build(mm_gpt.load("default", device="cpu"), Hints("default"))
    answer = next(function.fn for function in demo.fns.values() if function.name == "answer")
    for question in ("Is there a dog?", "Is there a giraffe?", "Or an emu?"):
        assert list(answer({"text": question, "files": [packaged], "lost_file": False}, [], 0, 1, 0, 2, 0))
    said = capsys.readouterr().err
    assert said.count("hint") == said.count("hardly met 'giraffe'") == 1


@pytest.mark.parametrize("command", ["ask", "chat", "caption"])
def test_commands_tell_it_once(command: str, packaged: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options: list[str] = ["--device", "cpu", "--max-new-tokens", "2"]
    lines: list[Any] = ["Is there a giraffe?", "Or an emu?"]
    argv = {
        "ask": ["ask", packaged, lines[0]],
        "chat": ["chat", packaged],
        "caption": ["caption", packaged, packaged, "--num-beams", "1", "--prompt", lines[0]],
    }[command]
    monkeypatch.setattr("sys.stdin.readline", lambda: f"{lines.pop(0)}\n" if lines else "")
    assert main([*argv, *options]) == 0
    output = capsys.readouterr()
    assert output.err.count("hint: the packaged model hardly met 'giraffe'") == 1
    assert output.err.count("hint") == 1
    assert "hint" not in output.out
