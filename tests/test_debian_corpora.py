"""Debian's documentation as corpora: the mirror's checks, hostile packages and drawings, Mallard pages. No network."""

import hashlib
import io
import lzma
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mm_gpt.datasets.building.shards import read_corpus
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("debian_packages", reason="the examples are not installed")

import debian_corpora  # noqa: E402
import debian_packages  # noqa: E402
import drawings  # noqa: E402
import mallard  # noqa: E402


def png(colour: str = "red", size: tuple[int, int] = (32, 24)) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def make_deb(members: list[tuple[str | tarfile.TarInfo, bytes]], packing: str = "xz") -> bytes:
    """A package: an `ar` of three members, the last of them a tar of `members`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{packing}") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    # an odd number of bytes in the first: every member begins at an even place
    for name, content in (
        ("debian-binary", b"2.0"),
        ("control.tar.xz", b"12"),
        (f"data.tar.{packing}", data.getvalue()),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    return out


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def make_mirror(folder: Path, packages: dict[str, bytes]) -> Path:
    stanzas = []
    for name, deb in packages.items():
        path = folder / "pool" / f"{name}_1.0_all.deb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(deb)
        stanzas.append(
            f"Package: {name}\nVersion: 1:1.0\nDescription: one\n with a second line\nFilename: pool/{path.name}\n"
            f"Size: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n"
        )
    packed = lzma.compress("\n".join(stanzas).encode())
    index = folder / "dists/bookworm/main/binary-all/Packages.xz"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_bytes(packed)
    sums = f" {hashlib.sha256(packed).hexdigest()} {len(packed):8} main/binary-all/Packages.xz\n"
    release = (
        f"-----BEGIN PGP SIGNED MESSAGE-----\n\nMD5Sum:\n {'0' * 32} 1 main/binary-all/Packages.xz\nSHA256:\n{sums}"
    )
    (folder / "dists/bookworm/InRelease").write_text(release)
    return folder


# ---- Packages ----


def test_a_package_is_found_checked_and_unpacked(tmp_path: Path) -> None:
    """The way of every package, with both packings that Debian has used."""
    debs = {p: make_deb([("./usr/share/doc/it/copyright", b"text")], p) for p in ("xz", "gz")}
    mirror = str(make_mirror(tmp_path / "mirror", debs))
    index = debian_packages.read_index(mirror)
    assert index["xz"].version == "1:1.0"
    for name in debs:
        path = debian_packages.download(index[name], tmp_path / "debs", mirror)
        errors = ErrorCounter()
        debian_packages.unpack(path, tmp_path / name, errors)
        assert (tmp_path / name / "usr/share/doc/it/copyright").read_bytes() == b"text"
        assert errors.total == 0


def test_bytes_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    """A mirror, or somebody on the way, that gives another file; nothing is left of it."""
    mirror = make_mirror(tmp_path / "mirror", {"one": make_deb([("a", b"a")])})
    package = debian_packages.read_index(str(mirror))["one"]
    deb = mirror / package.filename
    good = deb.read_bytes()
    for bad, message in ((good[:-1] + b"?", "SHA256"), (good + b"more", "longer")):
        deb.write_bytes(bad)
        with pytest.raises(MMGPTError, match=message):
            debian_packages.download(package, tmp_path / "debs", str(mirror))
        assert list((tmp_path / "debs").iterdir()) == []
    deb.write_bytes(good)
    copy = debian_packages.download(package, tmp_path / "debs", str(mirror))
    deb.unlink()
    assert debian_packages.download(package, tmp_path / "debs", str(mirror)) == copy  # not fetched twice


def test_an_index_that_the_release_does_not_name_is_refused(tmp_path: Path) -> None:
    mirror = make_mirror(tmp_path, {"one": b"x"})
    (mirror / "dists/bookworm/main/binary-all/Packages.xz").write_bytes(lzma.compress(b"Package: evil\n"))
    with pytest.raises(MMGPTError, match="is not the file that InRelease names"):
        debian_packages.read_index(str(mirror))
    with pytest.raises(MMGPTError, match="https"):
        debian_packages.read_index("http://deb.debian.org/debian")


def test_a_hostile_package_writes_nothing_outside(tmp_path: Path) -> None:
    """Names with `..`, absolute names, links that lead outside, and writing through a link, as tar attacks do."""
    fifo = tarfile.TarInfo("pipe")
    fifo.type = tarfile.FIFOTYPE
    deb = tmp_path / "evil.deb"
    members = [
        ("../outside", b"x"),
        ("/absolute", b"x"),
        ("a/../../outside", b"x"),
        link("door", "../.."),
        ("door/outside", b"x"),
        link("passwords", "/etc/passwd"),
        link("loop", "loop"),
        link("hard", "../../etc/passwd", tarfile.LNKTYPE),
        (fifo, b""),
        ("good", b"good"),
        ("good", b"again"),
        ("good/below", b"x"),
    ]
    deb.write_bytes(make_deb(members))
    errors = ErrorCounter()
    debian_packages.unpack(deb, tmp_path / "in/it", errors)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert made == {"evil.deb", "in/it/good", "in/it/door/outside"}
    assert (tmp_path / "in/it/good").read_bytes() == b"good"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert errors.counts["a name that leads outside of the package"] == 3
    assert errors.counts["two members of one name"] == 2
    assert errors.counts["neither a file nor a link"] == 1


def test_links_inside_a_package_are_followed(tmp_path: Path) -> None:
    """GNOME's translations share their figures by links, some of them by two, in any order."""
    deb = tmp_path / "a.deb"
    two = [link("help/de/b.png", "../C/b.png"), link("help/C/b.png", "/help/C/a.png"), ("help/C/a.png", b"pixels")]
    deb.write_bytes(make_deb(two))
    debian_packages.unpack(deb, tmp_path / "out", ErrorCounter())
    assert (tmp_path / "out/help/de/b.png").read_bytes() == b"pixels"


@pytest.mark.parametrize("data", [b"", b"!<arch>\n", b"PK\x03\x04 a zip", b"!<arch>\n" + b"x" * 60])
def test_what_is_no_package_is_named(tmp_path: Path, data: bytes) -> None:
    deb = tmp_path / "bad.deb"
    deb.write_bytes(data)
    with pytest.raises(MMGPTError, match=r"bad\.deb"):
        debian_packages.unpack(deb, tmp_path / "out", ErrorCounter())
    assert not (tmp_path / "out").exists()


def test_a_cut_off_package_leaves_no_folder(tmp_path: Path) -> None:
    """A folder that is there counts as unpacked: half of one would be used for ever."""
    deb = tmp_path / "cut.deb"
    deb.write_bytes(make_deb([("a", bytes(range(256)) * 400)], "gz")[:-200])
    with pytest.raises(MMGPTError, match=r"cut\.deb"):
        debian_packages.unpack(deb, tmp_path / "out", ErrorCounter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.deb"]


def test_a_package_that_unfolds_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_packages, "MAX_UNPACKED_BYTES", 10_000)
    deb = tmp_path / "bomb.deb"
    deb.write_bytes(make_deb([("a", bytes(9_000)), ("b", bytes(9_000))]))
    with pytest.raises(MMGPTError, match="unfolds to more"):
        debian_packages.unpack(deb, tmp_path / "out", ErrorCounter())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "Format: x\n\nFiles: debian/*\nLicense: GPL-3\n\nFiles: *\nCopyright: me\nLicense: CC-BY-SA-3.0\n text\n",
            "CC-BY-SA-3.0",
        ),
        ("It is a creative commons Public Domain Dedication\n", "public domain"),
        ("All rights reserved\n", None),
    ],
)
def test_the_licence_is_that_of_the_package_itself(tmp_path: Path, text: str, name: str | None) -> None:
    """Not the packager's own, which comes first in some files; and never a guess."""
    path = tmp_path / "usr/share/doc/it/copyright"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    if name is None:
        with pytest.raises(MMGPTError, match="names no licence"):
            debian_packages.licence(tmp_path, "it")
    else:
        assert debian_packages.licence(tmp_path, "it") == name


# ---- Mallard ----

PAGE = """<page xmlns="http://projectmallard.org/1.0/" xmlns:if="http://projectmallard.org/if/1.0/" id="clock">
<info><title type="link">Not this</title><desc>Nor this</desc></info>
<title>Set the
  clock</title>
<p>Press <gui>OK</gui> or <media type="image" src="icon.svg"><span>the cross</span></media>.</p>
<comment><cite>an author</cite><p>remove this later</p></comment>
<steps><title>Steps</title><item><p>Open.</p><media type="image" src="shot.png"><p>A dialog</p></media></item>
<item><p>Close.</p></item></steps>
<section id="more"><title>More</title>
<list><item><p>One</p><p>with more</p></item></list>
<if:choose><if:when test="x"><p>Inside another namespace</p></if:when></if:choose>
<table><tr><td><p>Key</p></td><td><p>Meaning</p></td></tr></table>
<figure><title>Drawn</title><media type="image" src="drawn.svg"/></figure>
<media type="video" src="film.webm"><p>subtitles</p></media>
<media type="image" src="gone.png"/><media type="image" src="../../../etc/passwd.png"/>
<screen>
a
  b
</screen></section><links type="section"/></page>"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="20mm" height="10mm"><rect width="20" height="30"/></svg>'


def gnome(tmp_path: Path) -> Path:
    folder = tmp_path / "usr/share/help/C/gnome-help"
    folder.mkdir(parents=True)
    (folder / "clock.page").write_text(PAGE)
    (folder / "shot.png").write_bytes(png())
    (folder / "drawn.svg").write_text(SVG)
    return folder


def test_a_page_comes_in_reading_order(tmp_path: Path) -> None:
    """Metadata, authors' comments and subtitles are not the page; icons are words of their sentence."""
    folder = gnome(tmp_path)
    errors = ErrorCounter()
    (document,) = mallard.read_pages(folder, errors)
    assert document.metadata == {"title": "Set the clock"}
    assert document.segments == (
        Text("Set the clock"),
        Text("Press OK or the cross."),
        Text("Steps"),
        Text("1. Open."),
        Image(folder / "shot.png", alt="A dialog"),
        Text("2. Close."),
        Text("More"),
        Text("- One"),
        Text("with more"),
        Text("Inside another namespace"),
        Text("Key | Meaning"),
        Text("Drawn"),
        Image(folder / "drawn.svg"),
        Text("a\n  b"),
    )
    assert errors.counts == {"image: missing": 1, "image: outside of its folder": 1}


def test_bad_pages_are_counted(tmp_path: Path) -> None:
    """Broken XML, XML of another kind, and entities that unfold without end."""
    bomb = '<!DOCTYPE p [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9)
    )
    (tmp_path / "a.page").write_text("<page>")
    (tmp_path / "b.page").write_text("<html/>")
    (tmp_path / "c.page").write_text(bomb + "]><page xmlns='http://projectmallard.org/1.0/'><p>&j;</p></page>")
    errors = ErrorCounter()
    assert list(mallard.read_pages(tmp_path, errors)) == []
    assert errors.counts == {"bad XML": 2, "not a Mallard page": 1}


def test_a_language_becomes_a_corpus(tmp_path: Path) -> None:
    """What the pipeline reads: pixels instead of SVG, the licence and language with each page."""
    pytest.importorskip("resvg_py")
    folder = gnome(tmp_path)
    assert debian_corpora.gnome_folders(tmp_path) == {"en": folder}
    errors = ErrorCounter()
    debian_corpora.write_gnome(folder, "en", "CC-BY-SA-3.0", tmp_path / "out", errors)
    (document,) = read_corpus(str(tmp_path / "out"), errors)
    assert isinstance(document, Document)
    assert document.id == "gnome/en/clock"
    assert document.metadata["licence"] == "CC-BY-SA-3.0"
    assert [image.size() for image in document.images] == [(24, 32), (224, 448)]


# ---- Drawings ----


def svg(
    body: str = "", *, size: str = 'width="100" height="50"', title: str = "A cat", keywords: tuple[str, ...] = ()
) -> bytes:
    bag = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
      xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" {size}>
      <metadata><rdf:RDF><cc:Work rdf:about=""><dc:title>{title}</dc:title><dc:description></dc:description>
      <dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject>
      <dc:creator><cc:Agent><dc:title>Jane Doe</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata>
      <rect width="40" height="40" fill="#0a0"/>{body}</svg>""".encode()


def test_a_caption_is_title_and_keywords() -> None:
    """Without the artist's name and the words by which the library sorts, which no picture shows."""
    keywords = ("unsorted", "animal", "jane doe", "a cat", "house_pet", "animal", "")
    title, captions = drawings.caption_svg(drawings.parse_svg(svg(keywords=keywords)))
    assert (title, captions) == ("A cat", ("A cat: animal, house pet",))
    with pytest.raises(BadRecordError, match="no title or keywords"):
        drawings.caption_svg(drawings.parse_svg(svg(title="01")))


@pytest.mark.parametrize("size", ['width="100" height="50"', 'width="2in" height="72pt"', 'viewBox="0 0 200 100"'])
def test_a_drawing_fills_its_longer_side(size: str) -> None:
    """Inches and points were 0 pixels at the rasteriser's own resolution; some drawings have one of each."""
    pytest.importorskip("resvg_py")
    with PILImage.open(io.BytesIO(drawings.rasterise(drawings.parse_svg(svg(size=size))))) as picture:
        assert picture.size == (448, 224)
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('<image xlink:href="/etc/photo.png" width="9" height="9"/>', "external reference"),
        ('<image href="http://10.0.0.1/a.png" width="9" height="9"/>', "external reference"),
        ('<image href="file:///a.png" width="9" height="9"/>', "external reference"),
        ('<image href="data:image/svg+xml;base64,AAAA" width="9" height="9"/>', "external reference"),
        ("<g>", "bad XML"),
        ('<rect width="900" height="900" fill="white"/>', "blank drawing"),
    ],
)
def test_hostile_and_empty_drawings_are_refused(body: str, reason: str) -> None:
    """A drawing that shows a file of this machine would put it into the corpus."""
    pytest.importorskip("resvg_py")
    with pytest.raises(BadRecordError, match=reason):
        drawings.rasterise(drawings.parse_svg(svg(body)))


@pytest.mark.parametrize("size", ['width="1" height="100000"', 'width="0" height="10"', 'viewBox="a b c d"', ""])
def test_absurd_sizes_are_refused(size: str) -> None:
    """448 pixels wide and a hundred thousand times as high would take all memory."""
    pytest.importorskip("resvg_py")
    with pytest.raises(BadRecordError, match=r"narrow|size"):
        drawings.rasterise(drawings.parse_svg(svg(size=size)))


def test_drawings_become_a_captioned_tar(tmp_path: Path) -> None:
    """What the reader of captioned images reads; bad drawings are counted, a second name is left out."""
    pytest.importorskip("resvg_py")
    from mm_gpt.datasets.formats.captioned import read_records

    folder = tmp_path / "svg"
    folder.mkdir()
    (folder / "a.svg").write_bytes(svg(keywords=("pet",)))
    (folder / "b.svg").hardlink_to(folder / "a.svg")
    (folder / "c.svg").write_bytes(b"no drawing")
    errors = ErrorCounter()
    assert debian_corpora.write_clipart(folder, "public domain", tmp_path / "a.tar", errors, workers=1) == 1
    (record,) = read_records(tmp_path / "a.tar", errors)
    assert record.captions == ("A cat: pet",)
    assert record.source == "openclipart"
    assert errors.counts == {"bad XML": 1}
