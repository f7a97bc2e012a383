"""Corpora from raw sources: the funnel's numbers, builds that are killed and go on, sources of every kind, bad images."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from mm_gpt import images as image_module
from mm_gpt.datasets import corpus as corpus_module
from mm_gpt.datasets.contamination import run as search_contamination
from mm_gpt.datasets.corpus import CorpusConfig, CorpusSummary, Runner, build_corpus, find_splits, process_split
from mm_gpt.datasets.evaluation_index import EvaluationItem
from mm_gpt.datasets.pipeline import UNKNOWN, Funnel, Step, as_document, language_of
from mm_gpt.datasets.samples import Conversation, ErrorCounter, QuestionAnswer, Record, Sample
from mm_gpt.datasets.shards import Corpus, ShardWriter, write_corpus_file
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError

pytest.importorskip("trafilatura")
pytest.importorskip("py3langid")

ARTICLES = {
    "harbour": """The old harbour was built when wooden ships still carried salt and timber across the bay. Today only a
few fishing boats leave before sunrise, and they return with mackerel for the market at noon. Visitors walk along the
stone quay, where a lighthouse of white bricks has stood for more than a century. Its keeper retired long ago, but the
lamp still turns every night. Children like to count the seconds between two flashes from their bedroom windows.""",
    "bread": """Good bread needs little more than flour, water, salt and patience. The dough rests overnight in a cool
kitchen, so that the yeast has time to work slowly and give the crumb its flavour. In the morning the baker folds it
twice, shapes a round loaf and lets it rise under a cloth. A hot oven with a bowl of steaming water makes the crust
crackle. Whoever cuts the loaf too early will find it sticky, and should wait another hour.""",
    "owls": """Barn owls hunt above meadows at dusk and find mice by hearing alone. Their faces work like dishes that
lead every rustle to the ears, of which one sits a little higher than the other. Soft feathers at the edges of the wings
let them glide without a sound. Farmers welcome the birds and leave a small opening under the roof, where a pair may
raise five or six chicks in a warm summer. In winters with deep snow many of them starve.""",
    "bridge": """Engineers inspected the railway bridge last week and found rust on several of its rivets. Trains must
slow down to walking speed until the repairs are finished, which the company expects in the spring. The arch was a
record when it opened, and painters needed four years to cover it with red lead. Postcards from that time show crowds in
Sunday clothes on both banks of the river. A museum beside the station keeps the plans and a wooden model.""",
    "chess": """The club meets every Thursday in the back room of the library, and beginners are always welcome. Members
bring their own boards, while clocks and score sheets are lent for free. After an opening lecture of twenty minutes the
pairings are drawn from a hat. Strong players give lessons to the young ones, who often beat them within a year or two.
Last season the second team won promotion on the final day with a rook ending that nobody had believed in.""",
    "garten": """Im Garten hinter dem alten Pfarrhaus wachsen seit vielen Jahren Apfelbäume, deren Früchte erst spät im
Oktober reif werden. Die Nachbarn treffen sich dann an einem Samstag, um gemeinsam zu ernten und Saft zu pressen. Wer
mithilft, darf so viele Flaschen mitnehmen, wie er tragen kann. Zwischen den Bäumen stehen Bienenkörbe, die ein junger
Imker aus dem Dorf betreut. Im Winter schneidet er die Äste zurück und streicht die Stämme mit Kalk.""",
}
PARTS = ("image: ", "text: ", "branch: ", "personal data: ")


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> PILImage.Image:
    """Smooth blobs of colour: no two look alike, and JPEG keeps them."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.BICUBIC)


def encoded(image: PILImage.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def page(article: str, *images: str, head: str = "", extra: str = "") -> str:
    """A page whose sentences stand in paragraphs of two, images after the first of them."""
    sentences = [f"{s.strip().removesuffix('.')}." for s in " ".join(ARTICLES[article].split()).split(". ")]
    first, *others = [f"<p>{' '.join(sentences[at : at + 2])}</p>" for at in range(0, len(sentences), 2)]
    figures = "".join(f'<p><img src="{name}"></p>' for name in images)
    body = f"<h1>About the {article}</h1>{first}{figures}{''.join(others)}{extra}"
    return f"<html><head><title>{article}</title>{head}</head><body><article>{body}</article></body></html>"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "pages"
    folder.mkdir()
    for seed in (1, 2, 3, 4):
        (folder / f"photo-{seed}.jpg").write_bytes(encoded(photo(seed), "JPEG"))
    (folder / "banner.png").write_bytes(encoded(photo(9, (120, 40))))
    (folder / "small.png").write_bytes(encoded(photo(5, (16, 16))))
    (folder / "plain.png").write_bytes(encoded(PILImage.new("RGB", (64, 64), "navy")))
    (folder / "broken.png").write_bytes(encoded(photo(6))[:200])
    mail = "<p>Write to harbour.master@example.com for the opening hours of the tower.</p>"
    found = {
        "a": page("harbour", "photo-1.jpg", "photo-2.jpg", extra=mail),
        "b": page("bread", "photo-3.jpg", "small.png", "plain.png", "broken.png", "banner.png"),
        "c": page("harbour", "photo-1.jpg", "photo-2.jpg", extra=mail),
        "d": page("owls"),
        "e": page("owls").replace("mice by hearing", "voles by hearing"),
        "f": page("garten", "banner.png"),
        "g": page("bridge", "photo-4.jpg", head='<meta name="robots" content="noai">'),
        "h": page("chess", "banner.png", "photo-4.jpg"),
        "i": "<html><body></body></html>",
    }
    for name, html in found.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return folder


def build(source: Path | str | list[str], out: Path, *, workers: int = 1, **options: Any) -> CorpusSummary:
    known = {"format", "images"}
    others = {key: value for key, value in options.items() if key in known}
    config = CorpusConfig(**{key: value for key, value in options.items() if key not in known})
    sources = source if isinstance(source, list) else [str(source)]
    return build_corpus(sources, out, config, runner=Runner(workers, progress=False), **others)


def samples_of(out: Path) -> list[Sample]:
    errors = ErrorCounter()
    found = list(Corpus(out).samples(errors))
    assert not errors.total
    return found


def text_of(sample: Sample) -> str:
    return "\n".join(s.text for s in as_document(sample).segments if isinstance(s, Text))


def files_of(out: Path) -> dict[str, str]:
    """Every file of a corpus by its bytes."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_accounts(funnel: Funnel) -> None:
    """At each step, what came is what is left and what was removed; and what is left comes to the next step."""
    for name in funnel.steps:
        for step in [*funnel.steps[name].values(), funnel.total(name)]:
            documents = sum(n for reason, n in step.removed.items() if not reason.startswith(PARTS))
            images = sum(n for reason, n in step.removed.items() if reason.startswith("image: "))
            assert step.came.documents == step.left.documents + documents, name
            assert step.came.images == step.left.images + images, name
            assert min(step.removed.values(), default=1) > 0, name
