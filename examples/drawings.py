"""SVG drawings as pixels and captions, with `resvg-py` (a wheel without system libraries).

A drawing is code from strangers. It is parsed and written anew before it is drawn: no entities, no scripts that matter
(nothing runs them), and no reference to a file or URL, which would show what lies on this machine.
"""

import io
import re
from xml.etree import ElementTree

from PIL import Image as PILImage

from mm_gpt.datasets.samples import BadRecordError, optional_import

SVG = "{http://www.w3.org/2000/svg}"
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
MAX_SVG_BYTES = 4 * 2**20
MAX_ELEMENTS = 100_000
MAX_ASPECT = 16
SIZE = 448
EMBEDDED = re.compile(r"data:(image/(png|jpe?g|gif))?[;,]", re.IGNORECASE)
UNITS = {"px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}
DPI = 96.0  # of CSS; without it, lengths in pt or mm come out as 0
# Words by which a library sorts, which say nothing about a drawing.
NO_KEYWORDS = {"unsorted", "clipart", "clip art", "clip-art", "image", "images", "media", "public domain", "svg"}
NO_KEYWORDS |= {"externalsource", "openclipart", "inkscape", "signs and symbols"}
LENGTH = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(px|pt|mm|cm|in|pc)?\s*")
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def parse_svg(data: bytes) -> ElementTree.Element:
    """The tree of a drawing. Raises BadRecordError when it is no SVG, too large, or refers to something outside."""
    if len(data) > MAX_SVG_BYTES:
        raise BadRecordError("drawing too large")
    try:
        root = ElementTree.fromstring(data)  # expat: no external entities, and bombs are refused
    except (ElementTree.ParseError, ValueError):
        raise BadRecordError("bad XML") from None
    if root.tag not in (f"{SVG}svg", "svg"):
        raise BadRecordError("not an SVG")
    for number, element in enumerate(root.iter()):
        if number > MAX_ELEMENTS:
            raise BadRecordError("drawing too large")
        for key in [key for key in element.attrib if key.rpartition("}")[2] == "href"]:
            value = element.attrib[key].strip()
            if value.startswith("#") or EMBEDDED.match(value):
                continue
            if element.tag in (f"{SVG}image", f"{SVG}feImage", f"{SVG}use"):
                raise BadRecordError("external reference")
            del element.attrib[key]  # a link to click, or where a gradient once came from
    return root


def rasterise(root: ElementTree.Element, size: int = SIZE) -> bytes:
    """A PNG on white whose longer side is `size` pixels. Raises BadRecordError when nothing can be seen on it."""
    resvg = optional_import("resvg_py")
    height, width = _extent(root)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRecordError("drawing too narrow")
    longer = {"width": size} if width >= height else {"height": size}
    no_fonts = next(root.iter(f"{SVG}text"), None) is None  # to look for them takes longer than to draw
    text = ElementTree.tostring(root, encoding="unicode")
    try:
        drawn = resvg.svg_to_bytes(svg_string=text, background="#ffffff", dpi=DPI, skip_system_fonts=no_fonts, **longer)
    except ValueError:
        raise BadRecordError("cannot be drawn") from None
    with PILImage.open(io.BytesIO(drawn)) as picture:
        flat = picture.convert("RGB")
    if max(high - low for low, high in flat.getextrema()) < 16:  # type: ignore[misc]
        raise BadRecordError("blank drawing")
    out = io.BytesIO()
    flat.save(out, "PNG")
    return out.getvalue()


def _extent(root: ElementTree.Element) -> tuple[float, float]:
    """(height, width) in CSS pixels, or in the units of the viewBox: only their ratio matters."""
    sides = [LENGTH.fullmatch(root.get(key, "")) for key in ("height", "width")]
    try:
        if sides[0] and sides[1]:
            height, width = (float(side[1]) * UNITS[side[2] or "px"] for side in sides if side)
        else:
            _, _, width, height = map(float, re.split(r"[\s,]+", root.get("viewBox", "").strip()))
    except ValueError:
        raise BadRecordError("drawing without a size") from None
    if not (0 < height < 1e7 and 0 < width < 1e7):
        raise BadRecordError("drawing without a size")
    return height, width


def caption_svg(root: ElementTree.Element) -> tuple[str, tuple[str, ...]]:
    """The title of a drawing and its captions: title with keywords, and its description when it has one.

    From its RDF (Dublin Core). Raises BadRecordError when it says nothing.
    """
    work = next((e for e in root.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == "Work"), None)
    if work is None:
        raise BadRecordError("no RDF")
    title = _tidy(work.findtext(f"{DC}title") or "")
    keywords = [_tidy(li.text or "") for subject in work.iter(f"{DC}subject") for li in subject.iter(f"{RDF}li")]
    people = {
        _tidy(name.text or "").lower()
        for role in ("creator", "rights", "publisher", "contributor")
        for agent in work.iter(f"{DC}{role}")
        for name in agent.iter(f"{DC}title")
    }
    said = {title.lower(), *people}
    keywords = [k for k in dict.fromkeys(keywords) if k and k.lower() not in said and k.lower() not in NO_KEYWORDS]
    if not re.search(r"[^\W\d_]{2}", title):
        title = ""
    caption = ": ".join(filter(None, [title, ", ".join(keywords[:8])]))
    if not caption:
        raise BadRecordError("no title or keywords")
    description = _tidy(work.findtext(f"{DC}description") or "")
    worth = len(description.split()) >= 3 and "http" not in description and description.lower() not in said
    return title, (caption, description[:500]) if worth else (caption,)


def _tidy(text: str) -> str:
    return " ".join(text.replace("_", " ").split())
