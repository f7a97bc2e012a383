"""From HTML to Document: which text stays, where the images stand, and the traps of real pages."""

import base64
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("trafilatura")

from mm_gpt.datasets.web.extract import ExtractConfig, extract, locate
from mm_gpt.datasets.web.html_flat import Spans
from mm_gpt.datasets.web.html_images import srcset_candidates
from mm_gpt.datasets.web.html_tree import decode_html
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError

LONG = [
    "The first paragraph is about the harbour of the town, which was built on wooden piles eight hundred years ago.",
    "The second paragraph tells how the piles were cut in winter, floated down the river and driven into the mud.",
    "The third paragraph says what was found when divers went down last year: most of the oak is as hard as stone now.",
    "The fourth paragraph closes with the plans of the council, which wants to show a pile in the museum soon.",
]
P = [f"<p>{text}</p>" for text in LONG]


def page(body: str, head: str = "") -> str:
    return f"<!DOCTYPE html><html lang=en><head><title>Piles</title>{head}</head><body>{body}</body></html>"


def article(*parts: str) -> str:
    return page(f"<article><h1>The harbour</h1>{''.join(parts)}</article>")


def run(html: str | bytes, url: str = "https://example.com/a/page.html", **config: object) -> list[str]:
    """Texts as they are, images as [source]."""
    document = extract(html, url, ExtractConfig(**config))  # type: ignore[arg-type]
    assert document is not None
    return shape(document)


def shape(document: Document) -> list[str]:
    return [
        s.text if isinstance(s, Text) else f"[{s.source}]" for s in document.segments if isinstance(s, Text | Image)
    ]


IMG = "https://example.com/a/"


def test_order_and_boilerplate() -> None:
    """Navigation, cookies, comments, related cards and their images go; the rest stands in the page's order."""
    html = page(
        "<header><a href=/><img src=logo.png></a></header>"
        "<nav><ul><li><a href=/a>Home</a></li><li><a href=/b>News</a></li></ul></nav>"
        "<div class=cookie-banner><p>We use cookies to improve your experience. <button>Accept</button></p></div>"
        f"<article><h1>The harbour</h1><img src=top.jpg alt='The  harbour'>{P[0]}"
        "<div><div><img src=mid.jpg></div></div>"
        f"{P[1]}{P[2]}<div class=related><a href=/x><img src=card.jpg>Ten cats you must see</a></div>{P[3]}"
        "<img src=end.jpg></article>"
        "<div id=comments><h2>Comments</h2><div class=comment><img src=face.jpg><p>First! Nice article.</p></div></div>"
        "<footer><img src=footer.png><p>Copyright</p></footer>"
    )
    document = extract(html, "https://example.com/a/page.html", removed=(removed := Counter()))
    assert document is not None
    top, mid, end = (f"[{IMG}{name}.jpg]" for name in ("top", "mid", "end"))
    assert [s for s in shape(document) if s != "The harbour"] == [top, LONG[0], mid, *LONG[1:], end]
    assert document.images[0].alt == "The harbour"
    assert removed == {"image: outside the main content": 4}


@pytest.mark.parametrize(
    "part",
    [
        "<h2>A heading <img src=x.png> with an image</h2>",
        "<table><tr><td>one cell</td><td><img src=x.png></td></tr><tr><td>two</td><td>three</td></tr></table>",
        "<dl><dt>term</dt><dd><img src=x.png> what it means in the end</dd></dl>",
        "<p>Some words with <a href=/big.html><img src=x.png></a> a linked image.</p>",
        "<figure><img src=x.png></figure>",
        "<figure><a href=x-big.png><picture><img src=x.png></picture></a></figure>",
        "<div><span><img src=x.png></span></div>",
        "<ul><li>One item of the list here</li><li>Another item <img src=x.png></li></ul>",
        "<blockquote><p>What somebody said about it <img src=x.png></p></blockquote>",
        "<center><font><b><img src=x.png></b></font></center>",
        "<noscript><img src=x.png></noscript>",
        "<amp-img src=x.png></amp-img>",
    ],
)
def test_image_in_every_place(part: str) -> None:
    """trafilatura itself loses images in most of these."""
    shown = run(article(P[0], P[1], part, P[2], P[3]))
    index = shown.index(f"[{IMG}x.png]")
    assert shown.index(LONG[1]) < index < shown.index(LONG[2])


@pytest.mark.parametrize(
    ("tag", "source"),
    [
        ("<img src='x.png' srcset='s.png 300w, l.png 1200w, m.png 600w'>", "l.png"),
        ("<img src='x.png' srcset='x1.png 1x, x2.png 2x'>", "x2.png"),
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' data-src='lazy.jpg'>", "lazy.jpg"),
        ("<img src='spacer.gif' data-original='lazy.jpg'>", "lazy.jpg"),
        ("<img src='spacer.gif' data-lazy-src='lazy.jpg' style='display: none'>", "lazy.jpg"),
        ("<img src='blank.png' data-srcset='a.jpg 100w, b.jpg 900w'>", "b.jpg"),
        (
            "<picture><source srcset='a.webp 500w, b.webp 1000w'><source srcset='c.jpg'><img src=d.jpg></picture>",
            "b.webp",
        ),
        (
            "<img src='/w_300,h_200/x.jpg' srcset='/w_300,h_200/x.jpg 300w, /w_900,h_600/x.jpg 900w'>",
            "/w_900,h_600/x.jpg",
        ),
        ("<img src='//cdn.example.org/x.jpg'>", "https://cdn.example.org/x.jpg"),
        ("<img src=' my\n photo.jpg '>", "my%20photo.jpg"),
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><noscript><img src=n.jpg></noscript>", "n.jpg"),
        ("<img src=n.jpg><noscript><img src=n2.jpg></noscript>", "n.jpg"),
        # what no reader takes stands in front of what one does
        ("<picture><source type=image/jxl srcset='a.jxl 900w'><img src=a.jpg></picture>", "a.jpg"),
        ("<picture><source type=image/heic srcset='a?f=heic 900w, b?f=heic 2x'><img src=a.jpg></picture>", "a.jpg"),
        ("<picture><source srcset=a.svg><source type=image/webp srcset=a.webp><img src=a.jpg></picture>", "a.webp"),
        ("<picture><source type=image/avif srcset='a.avif 900w'><img src=a.jpg></picture>", "a.avif"),
        ("<img srcset='a.jxl 900w, a.png 600w, b.png 300w' src=c.png>", "a.png"),
        ("<img data-src=a.heic src=a.jpg>", "a.jpg"),
        ("<img data-src='data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=' src=a.php>", "a.php"),
    ],
)
def test_which_file(tag: str, source: str) -> None:
    """Lazy loading and responsive images: the largest real file, once."""
    images = [s for s in run(article(*P[:2], tag, *P[2:])) if s.startswith("[")]
    base = "https://example.com" if source.startswith("/") else IMG
    assert images == [f"[{source}]" if "://" in source else f"[{base}{source}]"]


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("<img src=p.gif width=1 height=1>", "tracking pixel"),
        ("<img src=p.gif style='width:1px; height: 1px'>", "tracking pixel"),
        ("<img src=p.gif hidden>", "hidden"),
        ("<div style='display:none'><img src=p.gif></div>", "hidden"),
        ("<img src=logo.svg?v=1>", "kind of image that is not read"),
        ("<svg width=100><image href=x.png /><text>svg words</text></svg>", "inline SVG"),
        ("<img alt=nothing>", "no address"),
        ("<img src='data:image/png;base64,AAAA'>", "placeholder"),
        ("<img src='data:image/svg+xml;utf8,<svg/>'>", "kind of image that is not read"),
        ("<img src='file:///etc/passwd'>", "address leads nowhere"),
        ("<img src='javascript:alert(1)'>", "address leads nowhere"),
        ("<img src='http://[::1'>", "address leads nowhere"),
    ],
)
def test_no_picture(tag: str, reason: str) -> None:
    document = extract(article(*P[:2], tag, *P[2:]), "https://example.com/", removed=(removed := Counter()))
    assert document is not None
    assert not document.images
    assert removed == {f"image: {reason}": 1}
    assert not any("svg words" in s for s in shape(document))


def test_data_url_and_base() -> None:
    raw = bytes(range(256)) * 2
    html = article(P[0], P[1], f"<img src='data:image/png;base64,{base64.b64encode(raw).decode()}'>", *P[2:])
    assert extract(html).images[0].source == raw  # type: ignore[union-attr]
    lines = base64.encodebytes(raw).decode().replace("+", "%2B")
    html = article(P[0], P[1], f"<img src='data:image/x-png; base64,\n{lines}'>", *P[2:])
    assert extract(html).images[0].source == raw  # type: ignore[union-attr]
    html = page(f"<article>{''.join(P)}<img src=x.png></article>", "<base href='/static/'>")
    assert run(html)[-1] == "[https://example.com/static/x.png]"
    assert extract(html, "").images == []  # type: ignore[union-attr]  # a relative address of a page without one


def test_captions_and_alt() -> None:
    """A caption follows its image, whichever comes first in the page, and is dropped by choice."""
    figures = (
        "<figure><figcaption>Above <b>it</b></figcaption><img src=a.png alt='A pile'></figure>",
        ("<div class=wp-caption><img src=b.png><p class=wp-caption-text>Below it</p></div>"),
    )
    html = article(P[0], figures[0], P[1], figures[1], P[2], P[3])
    a, b = f"[{IMG}a.png]", f"[{IMG}b.png]"
    assert run(html)[-8:] == [LONG[0], a, "Above it", LONG[1], b, "Below it", *LONG[2:]]
    assert run(html, captions="drop")[-6:] == [LONG[0], a, LONG[1], b, *LONG[2:]]
    assert run(html, captions="drop", alt="text")[-7:] == [LONG[0], a, "A pile", LONG[1], b, *LONG[2:]]
    lost = article(P[0], "<figure><img src=x.svg><figcaption>Of a lost image</figcaption></figure>", *P[1:])
    assert "Of a lost image" not in run(lost)


def test_text_keeps_its_form() -> None:
    """Code keeps white space, lists their items, tables their rows, <br> its line; inline tags split no word."""
    html = article(
        P[0],
        "<pre><code>def f(x):\n    if x:\n\n        return  1\n</code></pre>",
        P[1],
        "<ol start=3><li><p>Cut the oak in the winter</p></li>"
        "<li>Float it down the river<ul><li>slowly</li></ul></li></ol>",
        "<table><tr><th>Year</th><th>Piles</th><th>Oak</th></tr><tr><td><p>1220</p></td><td>14<br>000</td><td></td></tr>"
        "<tr><td></td><td>9</td><td>8</td></tr></table>",
        "<p>One line of the address of the museum,<br>and an<b>other</b> line\n   of\tthe same.</p>",
        P[2],
        P[3],
    )
    shown = run(html)
    assert "def f(x):\n    if x:\n\n        return  1" in shown
    assert "3. Cut the oak in the winter\n4. Float it down the river\n  - slowly" in shown
    assert "Year | Piles | Oak\n1220 | 14 000\n| 9 | 8" in shown
    assert "One line of the address of the museum,\nand another line of the same." in shown


def test_emoji_and_formulas_are_text() -> None:
    html = article(
        *P[:3],
        "<p>The divers were happy <img class=emoji alt='😀' src=https://s.w.org/1f600.png> that day, and the mass was "
        "<math alttext='m^2'><mi>m</mi></math> as they had computed beforehand.</p>",
        P[3],
    )
    assert r"The divers were happy 😀 that day, and the mass was \(m^2\) as they had computed beforehand." in run(html)


@pytest.mark.parametrize(
    ("head", "headers", "reason"),
    [
        ("<meta name=robots content='noai, noimageai'>", {}, "opt-out: noai"),
        ("<meta name=ROBOTS content='NoIndex'>", {}, "opt-out: noindex"),
        ("<meta name=robots content='none'>", {}, "opt-out: noindex"),
        ("<meta name=tdm-reservation content=1>", {}, "opt-out: tdm-reservation"),
        ("", {"X-Robots-Tag": "unavailable_after: 25 Jun 2030 15:00:00 PST, noai"}, "opt-out: noai"),
        ("", {"x-robots-tag": "googlebot: nofollow\nnoai"}, "opt-out: noai"),
        ("", {"TDM-Reservation": "1"}, "opt-out: tdm-reservation"),
        ("", {"Content-Usage": "search=y, train-ai=n"}, "opt-out: train-ai=n"),
        ("<meta name=googlebot content=noindex>", {}, None),
        ("<meta name=robots content='max-snippet:-1, index'>", {"X-Robots-Tag": "otherbot: noai, noindex"}, None),
        ("<meta name=tdm-reservation content=0>", {"Content-Usage": "train-ai=y"}, None),
    ],
)
def test_opt_outs(head: str, headers: dict[str, str], reason: str | None) -> None:
    html = page(f"<article>{''.join(P)}</article>", head)
    document = extract(html, headers=headers, removed=(removed := Counter()))
    assert (document is None) == (reason is not None)
    assert dict(removed) == ({reason: 1} if reason else {})
    assert extract(html, config=ExtractConfig(page_opt_outs=()), headers=headers) is not None


def test_images_opt_out_alone() -> None:
    html = page(f"<article>{''.join(P)}<img src=x.png></article>", "<meta name=robots content=noimageai>")
    document = extract(html, "https://example.com/", removed=(removed := Counter()))
    assert document is not None
    assert not document.images
    assert removed == {"image: opt-out: noimageai": 1}


def test_metadata() -> None:
    head = (
        "<meta property=article:published_time content=2024-05-06T07:08:09Z>"
        "<link rel=license href=https://creativecommons.org/licenses/by/4.0/>"
    )
    document = extract(page(f"<article>{''.join(P)}</article>", head), "https://example.com/p")
    assert document is not None
    assert document.metadata == {
        "url": "https://example.com/p",
        "title": "Piles",
        "language": "en",
        "date": "2024-05-06",
        "licence": "https://creativecommons.org/licenses/by/4.0/",
    }
    assert document.id == "https://example.com/p"


GERMAN = "Die Pfähle stehen in der Mündung des Flusses; größer wären sie für die Brücke schöner gewesen, sagt Müller."
RUSSIAN = "Сваи стоят в устье реки уже восемьсот лет, и водолазы нашли, что дуб за это время стал твёрдым, как камень."


@pytest.mark.parametrize(
    ("text", "encoding", "declared", "header"),
    [
        (GERMAN, "utf-8", "iso-8859-1", ""),  # declared wrong
        (GERMAN, "utf-8-sig", "iso-8859-1", "windows-1252"),
        (GERMAN, "cp1252", "iso-8859-1", ""),
        (GERMAN, "cp1252", "utf-8", ""),  # declared wrong, the other way
        (GERMAN, "utf-16", "", ""),
        (GERMAN, "utf-16-le", "", ""),  # without a mark
        (GERMAN, "cp1252", "unicode_escape", "windows-1252"),  # a codec of Python's that is no charset
        (RUSSIAN, "cp1251", "", "windows-1251"),
        (RUSSIAN, "cp1251", "", ""),  # declared nowhere
        (RUSSIAN, "koi8-r", "koi8-r", ""),
        ("杭は八百年前から川の河口に立っている。", "cp932", "Shift_JIS", ""),
        ("杭は八百年前から川の河口に立っている。", "iso-2022-jp", "iso-2022-jp", ""),
        ("桩子已经在河口矗立了八百年。", "gb18030", "gb2312", ""),
    ],
)
def test_encodings(text: str, encoding: str, declared: str, header: str) -> None:
    meta = f"<meta charset={declared}>" if declared else ""
    html = f"<html><head>{meta}</head><body>{text * 3}</body></html>".encode(encoding)
    assert text in decode_html(html, header)


def test_one_broken_byte_does_not_change_the_encoding() -> None:
    assert GERMAN in decode_html(f"<meta charset=utf-8>{GERMAN * 20}".encode() + b"\xff")


def test_hostile_pages_end_quickly() -> None:
    """Deep nesting, entity bombs, huge and broken pages: a document or a counted reason, never an exception."""
    deep = "<div>" * 50_000 + P[0] + "</div>" * 50_000
    bomb = "<!DOCTYPE html [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]>" + article(
        *P, "<p>&b;</p>"
    )
    removed: Counter[str] = Counter()
    extract(page(deep), removed=removed)
    extract(article(*P, deep), removed=removed)
    assert removed["text: nested too deeply"] >= 1
    assert extract(bomb) is not None
    assert extract(article(*P) * 3, config=ExtractConfig(max_html_bytes=100), removed=removed) is None
    assert extract(article(*P, "<b></b>" * 1000), config=ExtractConfig(max_elements=900), removed=removed) is None
    for junk in (
        b"",
        b" ",
        b"\0\0\0",
        b"<",
        b"<!--",
        b"\xff\xfe",
        "\ud800",
        "<html></html>",
        "<p>\x01\x0b</p>",
        "%PDF-1.4",
    ):
        assert extract(junk, removed=removed) is None
    assert removed["too large"] == removed["too many elements"] == 1
    assert srcset_candidates("," * 200_000) == []


def test_config_is_checked_and_travels() -> None:
    with pytest.raises(ConfigError, match="captions is 'all'"):
        ExtractConfig(captions="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown opt-out dnt"):
        ExtractConfig(page_opt_outs=("dnt",))
    config = replace(ExtractConfig(), fast=True)
    assert pickle.loads(pickle.dumps(config)) == config


def test_heading_belongs_to_what_follows() -> None:
    """A heading that a table of contents repeats above must not be found there: an image would change its side."""
    from lxml import etree

    body = etree.fromstring(
        f"<body><head>Divers</head><p>{LONG[0]}</p><p>{LONG[1]}</p><p>not in the page at all</p></body>"
    )
    stream = "".join(f"Divers Plans {LONG[2]} Divers {LONG[0]} {LONG[1]}".split())
    spans, extra = locate(body, stream)
    assert sorted(stream[a:b] for a, b in spans) == sorted("".join(t.split()) for t in ("Divers", LONG[0], LONG[1]))
    assert all(start > 20 for start, _ in spans)
    assert extra == []


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8), st.integers(0, 45), st.integers(0, 45))
def test_spans_count_like_sets(pairs: list[tuple[int, int]], start: int, end: int) -> None:
    covered = {n for a, b in pairs for n in range(a, b)}
    assert Spans(pairs).within(min(start, end), max(start, end)) == len(covered & set(range(*sorted((start, end)))))


TAGS = (
    "ul li table tr td /td /table figure figcaption /figure pre div /div /ul h2 br /p noscript svg math select /article"
    " ol /ol caption /body blockquote dl dd b /b"
)
PIECES = st.sampled_from(
    [*P, *(f"<{tag}>" for tag in TAGS.split()), "<img src=b.png>", "text & more", "<a href=x>", "<figcaption>c"]
)


@settings(max_examples=15, deadline=None)
@given(st.lists(PIECES, max_size=14))
def test_broken_html_never_raises_and_keeps_the_text(parts: list[str]) -> None:
    """Whatever is unclosed: no exception, no empty segment, and each paragraph that trafilatura kept is there once."""
    import trafilatura

    html = page("<article>" + P[0] + P[1] + "".join(parts))
    document = extract(html, "https://example.com/")
    reference = trafilatura.extract(html, include_comments=False) or ""
    if document is not None:
        assert all(s.text.strip() for s in document.segments if isinstance(s, Text))
        ours = "".join("".join(s.text for s in document.segments if isinstance(s, Text)).split())
        for text in LONG:
            assert ("".join(text.split()) in ours) or text not in reference


def test_local_images_go_first() -> None:
    html = article(*P, "<img src=page_files/x.png srcset='https://cdn.example.com/big.png 2000w'>")
    local = {"page_files/x.png": Path("/tmp/x.png")}.get
    document = extract(html, "https://example.com/", local=local)
    assert document is not None
    assert document.images[0].source == Path("/tmp/x.png")


def test_words_of_a_sentence_stay_whatever_their_class() -> None:
    """Stops: "Choose from the menu" without its menu, because `guimenu` looks like navigation to the extractor."""
    html = """<html><head><title>x</title></head><body><div class="sect1"><h1>Files</h1>
    <ol><li><p>With <span class="guimenu">File</span> → <span class="guimenuitem">New</span> you make a new image, and
    the dialog that opens asks for its width and its height in pixels, before anything is drawn.</p></li></ol>
    <p>The second paragraph has enough words, so that the page has a text that is worth to be kept at all.</p></div>
    </body></html>"""
    document = extract(html)
    assert document is not None
    text = " ".join(segment.text for segment in document.segments if isinstance(segment, Text))
    assert "With File → New you make a new image" in text


NAV = (
    "<div class=navheader><table><tr><td><a accesskey=p href=a.html><img src=prev.png alt=Prev></a></td>"
    "<th>Chapter 16. Menus</th><td><a accesskey=n href=b.html><img src=next.png alt=Next></a></td></tr></table></div>"
)
FIGURE = (
    "<div class=figure><p class=title><b>Figure 1. The harbour from above</b></p><div class=figure-contents>"
    "<div class=mediaobject><img src=harbour.png alt='The harbour'></div></div></div>"
)


@pytest.mark.parametrize(
    "body",
    [
        # the figure is all that its section has
        f"<div class=sect1><div class=sect2><h3>Overview</h3>{FIGURE}</div><div class=sect2><h3>Piles</h3>{''.join(P)}"
        "</div></div>",
        # one paragraph is all that is kept
        f"<div class=sect1><div><h2>The harbour</h2></div>{FIGURE}{P[0]}</div>",
        # so much is left out around it that only the caption speaks for it
        f"<div class=sect1>{''.join(P)}<div class=sect2>{FIGURE}<ul>"
        + "".join(f"<li><a href=/{n}>Another page of the manual, number {n}</a></li>" for n in range(30))
        + "</ul></div></div>",
    ],
)
def test_figures_of_a_manual_stay_and_its_arrows_go(body: str) -> None:
    """As DocBook writes it: the figure is content wherever it stands in the sections, prev and next are not."""
    document = extract(page(NAV + body), "https://example.com/a/page.html", removed=(removed := Counter()))
    assert document is not None
    assert [image.source for image in document.images] == [f"{IMG}harbour.png"]
    assert "Figure 1. The harbour from above" in shape(document)
    assert removed == {"image: outside the main content": 2}


def test_arrows_and_cards_inside_the_text_are_no_content() -> None:
    """A link of nothing but an arrow, as latex2html writes it, and a captioned card that leads to another page."""
    image, words = "<img src=card.jpg>", "Ten cats you must see before you leave the town"
    arrow = "<a href=p2.html><img src=next.gif alt='[next]'></a>"
    card = f"<figure><a href=/x>{image}</a><figcaption><a href=/x>{words}</a></figcaption></figure>"
    captioned = f"<figure>{image}<figcaption>{words}</figcaption></figure>"
    more = f"<p>{'Words that the extractor leaves out with the block around them. ' * 6}</p>"
    around = f"<div class=sect1>{P[0]}{P[1]}{arrow}{P[2]}{P[3]}<div class=more-on>{{}}{more}</div></div>"
    assert run(page(around.format(card))) == LONG
    assert run(page(around.format(captioned))) == [*LONG, f"[{IMG}card.jpg]", words]


def test_inline_tags_leave_hidden_words_and_boilerplate_where_they_are() -> None:
    """Highlighted code comes out whole; what a style hides and an `edit` link beside a heading stay out."""
    code = "<pre><span class=kn>import</span> <span>piles</span>\n\n<span class=n>piles</span>.<span>cut</span>()</pre>"
    html = article(
        P[0],
        "<h2>Divers<span class=mw-editsection>[<a href=/edit>edit</a>]</span></h2>",
        P[1],
        f"{code}<p>The <em class=menuitem>piles</em> were cut<span style='display:none'>secret words</span> in winter,"
        " all of them from the same forest, as the rings of the wood have shown.</p>",
        *P[2:],
    )
    shown = run(html)
    assert "import piles\n\npiles.cut()" in shown
    assert any(s.startswith("The piles were cut") for s in shown)
    assert not any("secret" in s for s in shown)
