"""The language stage: languages, scores, what it writes and drops."""

import pickle
import time
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("py3langid")

from mm_gpt.datasets.filters.language_id import Language, identify
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError

SENTENCES = {
    "en": "Press the button to see a list of all the open windows.",
    "de": "Klicken Sie auf den Knopf, um alle offenen Fenster zu sehen.",
    "fr": "Appuyez sur le bouton pour voir la liste des fenêtres ouvertes.",
    "es": "Pulse el botón para ver una lista de todas las ventanas abiertas.",
    "it": "Premere il pulsante per vedere l'elenco di tutte le finestre aperte.",
    "nl": "Druk op de knop om een lijst van alle open vensters te zien.",
    "pt": "Pressione o botão para ver uma lista de todas as janelas abertas.",
    "sv": "Tryck på knappen för att se en lista över alla öppna fönster.",
    "pl": "Naciśnij przycisk, aby zobaczyć listę wszystkich otwartych okien.",
    "ru": "Нажмите кнопку, чтобы увидеть список всех открытых окон.",
    "uk": "Натисніть кнопку, щоб побачити список усіх відкритих вікон.",
    "el": "Πατήστε το κουμπί για να δείτε μια λίστα με όλα τα παράθυρα.",
    "ja": "ボタンを押すと、開いているすべてのウィンドウが表示されます。",
    "zh": "按下按钮可以查看所有打开的窗口的列表。",
    "ko": "단추를 누르면 열려 있는 모든 창의 목록을 볼 수 있습니다.",
    "hi": "सभी खुली खिड़कियों की सूची देखने के लिए बटन दबाएँ।",
    "ar": "اضغط على الزر لرؤية قائمة بجميع النوافذ المفتوحة.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_one_sentence_is_enough(language: str) -> None:
    found, score = identify(SENTENCES[language])
    assert found == language
    assert 0.5 < score <= 1


def test_addresses_and_numbers_say_nothing() -> None:
    """Stops a German paragraph with an English address from counting as English."""
    assert identify("https://www.example.com/the/list/of/all/windows 2023 user@example.com") == ("und", 0.0)
    text = "Siehe https://example.com/this-is-the-list-of-all-the-open-windows-and-how-to-close-them für mehr."
    assert identify(text)[0] == "de"


@pytest.mark.parametrize("text", ["OK!", "OK", "Menu", "Login", "Foto", "JPG", "Hello", "x", "да"])
def test_without_evidence_no_language_is_named(text: str) -> None:
    """Two letters say nothing, and the first of all equal languages is Serbian."""
    assert identify(text) == ("und", 0.0)


def test_a_script_of_its_own_is_evidence() -> None:
    assert [identify(word)[0] for word in ("ไทย", "한국", "ქ", "שלום")] == ["th", "ko", "ka", "he"]


@pytest.mark.parametrize(("undetermined", "min_score", "stays"), [("drop", 0.0, 0), ("keep", 0.0, 3), ("keep", 0.8, 3)])
def test_what_does_not_tell_its_language_stays_or_goes_as_asked(
    undetermined: Any, min_score: float, stays: int
) -> None:
    stage = Language(languages=("en",), undetermined=undetermined, min_score=min_score)
    removed: Counter[str] = Counter()
    documents = [Document((Text("OK!"),)), Document((Image("a.jpg"),)), Document(())]
    kept = [out for document in documents if (out := stage(document, removed)) is not None]
    assert len(kept) == stays
    assert removed == Counter({"undetermined language": 3 - stays} if stays < 3 else {})
    assert all(document.metadata == {"language": "und", "language_score": 0.0} for document in kept)
    assert stage(Document((Text(SENTENCES["de"]),)), removed) is None
    assert stage(Document((Text(SENTENCES["en"]),)), removed) is not None


def test_numbers_are_no_letters() -> None:
    for empty in ("", "   ", "123 !?", "😀"):
        assert identify(empty) == ("und", 0.0)


def test_stage_writes_and_keeps() -> None:
    document = Document((Text(SENTENCES["de"]), Image("a.jpg")), id="x", metadata={"url": "u", "language": "en"})
    removed: Counter[str] = Counter()
    out = Language()(document, removed)
    assert out is not None
    assert out.segments == document.segments
    assert out.metadata["language"] == "de", "the page's own claim is often its template's"
    assert 0.9 < out.metadata["language_score"] <= 1
    assert out.metadata["url"] == "u"
    assert document.metadata["language"] == "en"
    stage = pickle.loads(pickle.dumps(Language(languages=("de", "fr"), min_score=0.8)))
    assert stage(document, removed) == out
    assert not removed


def test_stage_drops() -> None:
    removed: Counter[str] = Counter()
    english = Document((Text(SENTENCES["en"]),))
    assert Language(languages=("de",))(english, removed) is None
    assert Language(min_score=0.5)(Document((Text("12"),)), removed) is None
    assert Language(languages=("en",))(Document((Image("a.jpg"),)), removed) is None
    assert removed == {"other language": 1, "undetermined language": 1, "uncertain language": 1}
    control = Document((Text(SENTENCES["de"], is_control=True), Text(SENTENCES["en"])))
    assert Language(languages=("en",))(control, removed) is not None


def test_wrong_languages_are_named() -> None:
    with pytest.raises(MMGPTError, match="unknown language 'english'"):
        Language(languages=("english",))(Document(()), Counter())
    with pytest.raises(ConfigError, match="languages"):
        Language(languages="en")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min_score"):
        Language(min_score=1.5)
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        Language(undetermined="kept")  # type: ignore[arg-type]


def test_hostile_text_is_cut() -> None:
    start = time.process_time()
    for unit in ("a", "a@", "http://", "@", "\ud800", "\0"):
        identify(unit * 2_000_000)
    assert time.process_time() - start < 5
