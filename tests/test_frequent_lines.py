"""Frequent lines: counted exactly in little memory, over parts; taken out, and nothing else."""

import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.frequent_lines import DropFrequentLines, count_lines, find_frequent_lines, site_of
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError


def page(site: str, index: int, *texts: str) -> Document:
    segments = (*(Text(text) for text in texts), Image("http://a.example/x.png"))
    return Document(segments, id=f"{site}/{index}", metadata={"url": f"https://www.{site}/{index}"})


def texts(document: Document | None) -> list[str]:
    assert document is not None
    return [segment.text for segment in document.segments if isinstance(segment, Text)]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_menu_goes_and_the_rest_stays(tmp_path: Path, num_parts: int) -> None:
    documents = [page("a.example", i, "Home | News", f"Story {i}\nRead more...\n  on it", "Hello") for i in range(9)]
    documents += [page("b.example", i, "Home | News", f"Other {i}") for i in range(2)]
    parts = [tmp_path / f"part-{index}" for index in range(num_parts)]
    for index, part in enumerate(parts):
        assert count_lines(documents[index::num_parts], part) == len(documents[index::num_parts])
    assert find_frequent_lines(parts, tmp_path / "table", min_documents=5) == 4
    stage = pickle.loads(pickle.dumps(DropFrequentLines(table=str(tmp_path / "table"))))
    removed: Counter[str] = Counter()
    assert texts(stage(documents[3], removed)) == ["Story 3"]
    assert removed == {"text: frequent line": 4}
    assert texts(stage(page("a.example", 99, "HOME |news!", "New"), removed)) == ["New"]
    assert stage(documents[10], removed) is documents[10]  # two documents are few
    only = Document((Text("Hello"),), metadata={"url": "http://a.example/"})
    assert stage(only, removed) is None
    assert removed["nothing but frequent lines"] == 1


def test_over_the_whole_corpus(tmp_path: Path) -> None:
    """Each site shows the notice twice: rare on a site, frequent over all."""
    documents = [page(f"{site}.example", i, "We use cookies", f"{site} {i}") for site in range(5) for i in range(2)]
    count_lines(documents, tmp_path / "sites")
    count_lines(documents, tmp_path / "corpus", scope="corpus")
    assert find_frequent_lines([tmp_path / "sites"], tmp_path / "t1", min_documents=3) == 0
    assert find_frequent_lines([tmp_path / "corpus"], tmp_path / "t2", min_documents=3) == 1
    removed: Counter[str] = Counter()
    assert texts(DropFrequentLines(table=str(tmp_path / "t1"))(documents[0], removed)) == ["We use cookies", "0 0"]
    assert texts(DropFrequentLines(table=str(tmp_path / "t2"))(documents[0], removed)) == ["0 0"]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([0.0, 0.05, 0.5]))
def test_as_counted_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, min_documents: int, min_share: float
) -> None:
    """With almost no memory: many runs, merged over blocks."""
    folder, chance = tmp_path_factory.mktemp("lines"), random.Random(seed)
    documents = []
    for index in range(300):
        lines = [f"line {int(chance.paretovariate(0.7)) % 500}" for _ in range(chance.randint(0, 12))]
        documents.append(page(f"{chance.randint(0, 3)}.example", index, "\n".join(lines)))
    counts: Counter[tuple[str, str]] = Counter()
    for one in documents:
        counts.update({(site_of(one), line) for line in texts(one)[0].split("\n") if line})
    sizes = Counter(site_of(one) for one in documents)
    frequent = {k for k, n in counts.items() if n >= min_documents and n >= min_share * sizes[k[0]]}
    for index in range(2):
        count_lines(documents[index::2], folder / str(index), memory=1)
    found = find_frequent_lines(
        [folder / "0", folder / "1"], folder / "table", min_documents=min_documents, min_share=min_share, memory=1
    )
    assert found == len(frequent)
    stage = DropFrequentLines(table=str(folder / "table"))
    for one in documents[:50]:
        kept = stage(one, Counter())
        expected = [line for line in texts(one)[0].split("\n") if line and (site_of(one), line) not in frequent]
        assert [line for text in texts(kept) for line in text.split("\n") if line] == expected


def test_sites() -> None:
    values = {
        "https://www.Example.org:80/x": "example.org",
        "http://[broken": "s",
        "no address": "s",
        "": "s",
    }
    for url, site in values.items():
        assert site_of(Document((), metadata={"url": url, "source": "s"})) == site
    assert site_of(Document(())) == ""


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scope is 'x'"):
        count_lines([], tmp_path / "a", scope="x")  # type: ignore[arg-type]
    with pytest.raises(MMGPTError, match="missing or not a finished count"):
        find_frequent_lines([tmp_path / "a"], tmp_path / "t")
    count_lines([], tmp_path / "a")
    count_lines([], tmp_path / "b", scope="corpus")
    with pytest.raises(MMGPTError, match="counted by corpus"):
        find_frequent_lines([tmp_path / "a", tmp_path / "b"], tmp_path / "t")
    with pytest.raises(ConfigError, match="min_documents is 1"):
        find_frequent_lines([tmp_path / "a"], tmp_path / "t", min_documents=1)
    assert find_frequent_lines([tmp_path / "a"], tmp_path / "t") == 0
    one = page("a.example", 0, "text")
    assert DropFrequentLines(table=str(tmp_path / "t"))(one, Counter()) is one
    with pytest.raises(MMGPTError, match="not a table of frequent lines"):
        DropFrequentLines(table=str(tmp_path / "none"))(one, Counter())
