"""HTML as bytes to a tree, and what a page says about itself: address, title, language, date, licence, opt-outs.

Opt-outs that are read, from `<meta>` and from the HTTP headers that came with the page:
- robots directives (`<meta name="robots">`, `X-Robots-Tag`): `noai` and `noimageai` (DeviantArt, 2022), `noindex` and
  `noimageindex`, the four that img2dataset honours; `none` means `noindex`. Rules addressed to one named bot are not
  ours.
- the TDM Reservation Protocol of the W3C community group: `tdm-reservation: 1`.
- the IETF's `Content-Usage` header (draft-ietf-aipref-attach): `train-ai=n`.

What a site says in files of its own (`/.well-known/tdmrep.json`, `robots.txt`, `ai.txt`) is not read. It needs all
files of a site before the first page of it, and those of a crawl lie in other archives than its pages. `robots.txt`
speaks to the crawler: who fetches pages asks it then.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from mm_gpt.datasets.samples import BadRecordError, optional_import

_DECLARED = re.compile(
    rb"""<(?:meta[^>]{1,300}?charset|\?xml[^>]{1,99}?encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
# Names that pages use, and nothing else: Python also knows codecs like unicode_escape or idna.
_CHARSET = re.compile(
    r"utf-?8|utf-?16-?(le|be)?|iso-?8859-?\d+|iso-2022-jp|windows-\d+|cp-?\d+|koi8-[ru]|gbk|gb-?\d+|big5(-hkscs)?"
    r"|euc-(jp|kr)|shift[_-]jis|x-sjis|macintosh|tis-620|us-ascii|ascii|latin-?1|ks_c_5601-1987|hz-gb-2312",
    re.I,
)
# What browsers read instead of what is declared (WHATWG Encoding Standard, names and labels).
_REALLY = {
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin1", "latin-1", "us-ascii", "ascii"), "cp1252"),
    **dict.fromkeys(("gb2312", "gb-2312", "gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "x-sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    "big5": "big5hkscs",
    "iso-8859-9": "cp1254",
    "tis-620": "cp874",
    "macintosh": "mac_roman",
    "hz-gb-2312": "hz",
}
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_SNIFFED_BYTES = 2**14

MAX_ATTRIBUTES = 1000
"""Of one tag: libxml2 compares each with each."""
MAX_ATTRIBUTES_OF_PAGE = 200_000
MAX_VALUE_CHARACTERS = 10_000
"""Of the attributes that are searched again for each image in the element; longer values count as none."""
_ATTRIBUTE = r"""[\s/]*+[^\s/>][^\s/>=]*+(?:\s*+=\s*+(?:"[^"]*+"?+|'[^']*+'?+|[^\s>]*+))?+"""
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_TAG = re.compile(rf"<[a-zA-Z][^\s/>]*+((?:{_ATTRIBUTE})*+)")


def decode_html(data: bytes, charset: str = "") -> str:
    """The text of a page. `charset` is what its HTTP header says.

    A byte order mark decides, then whether it is valid UTF-8 (a page that declares latin-1 and is UTF-8 is common),
    then what is declared if the bytes agree, then a guess from the bytes. Never fails: what fits nothing is U+FFFD.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    if data[:64].lstrip()[:4] in (b"<\0!\0", b"<\0h\0", b"<\0?\0"):
        return data.decode("utf-16-le", "replace")
    found = _DECLARED.search(data[:4096])
    names = [name.lower() for name in (charset, found[1].decode("ascii", "replace") if found else "") if name]
    declared = [_REALLY.get(name, name) for name in names if _CHARSET.fullmatch(name)]
    if ("iso-2022-jp" in declared and b"\x1b" in data) or ("hz" in declared and b"~{" in data):  # seven-bit, not ASCII
        declared.sort(key=lambda name: name not in ("iso-2022-jp", "hz"))
    else:
        declared.insert(0, "utf-8")
    num_high = len(data) - len(data.translate(None, bytes(range(128, 256))))
    best = ""
    for encoding in declared:
        if encoding.startswith(("utf-16", "utf16")):
            continue  # a page whose ASCII declaration can be read is none
        try:
            return data.decode(encoding)
        except LookupError:
            continue
        except ValueError:
            # a few broken bytes do not make it another encoding
            text = data.decode(encoding, "replace")
            if not best and text.count("\ufffd") * 50 <= num_high:
                best = text
    return best or _guessed(data)


def _guessed(data: bytes) -> str:
    high = re.search(rb"[\x80-\xff]", data)
    start = max(0, high.start() - 1024) if high else 0
    guess = optional_import("charset_normalizer").from_bytes(data[start : start + _SNIFFED_BYTES]).best()
    try:
        return data.decode(guess.encoding if guess is not None else "cp1252", "replace")
    except LookupError:
        return data.decode("cp1252", "replace")


def parse_html(text: str) -> tuple[Any, bool]:
    """The lxml tree, and whether it is whole: libxml2 stops at 256 levels.

    Raises BadRecordError without any element, and for more attributes than pages have.

    No entity of the page's own is expanded, nothing is loaded. MathML becomes its LaTeX source in the text.
    """
    has_long_tags = _check_attributes(text)
    html, etree = optional_import("lxml.html"), optional_import("lxml.etree")
    parser = html.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False, default_doctype=False
    )
    # lxml.html looks up a class for each element in Python: a tenth of the time that all the rest takes
    parser.set_element_class_lookup(etree.ElementDefaultClassLookup(element=html.HtmlElement))
    try:
        tree = html.document_fromstring(text.replace("\0", "").encode("utf-8", "replace"), parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, AssertionError):
        raise BadRecordError("no HTML") from None
    last = parser.error_log.last_error
    whole = last is None or "depth" not in last.message
    if has_long_tags:
        for value in tree.xpath(f"//@*[string-length() > {MAX_VALUE_CHARACTERS}]"):
            if value.attrname in ("style", "class", "id", "role", "alt", "width", "height"):
                del value.getparent().attrib[value.attrname]
    for element in list(tree.iter("math")) if "<math" in text else ():
        _math_to_text(element)
    return tree, whole


def _check_attributes(text: str) -> bool:
    """Whether there are very long tags. Raises BadRecordError for too many attributes, before libxml2 sees them."""
    total, has_long_tags = 0, False
    for tag in _TAG.finditer(text):
        count = 0
        for count, _ in enumerate(_ATTRIBUTES.finditer(tag[1]), 1):
            if count > MAX_ATTRIBUTES:
                raise BadRecordError("too many attributes")
        total += count
        has_long_tags = has_long_tags or len(tag[1]) > MAX_VALUE_CHARACTERS
    if total > MAX_ATTRIBUTES_OF_PAGE:
        raise BadRecordError("too many attributes")
    return has_long_tags


def _math_to_text(element: Any) -> None:
    source = next((a.text for a in element.iter("annotation") if "tex" in a.get("encoding", "")), None)
    source = " ".join((source or element.get("alttext") or "").split())
    if source:
        left, right = ("\\[", "\\]") if element.get("display") == "block" else ("\\(", "\\)")
        del element[:]
        element.tag, element.text = "span", f"{left}{source}{right}"
        element.attrib.clear()


def base_url(tree: Any, url: str) -> str:
    """What relative addresses of the page are relative to; "" when nobody knows."""
    for element in tree.iter("base"):
        if element.get("href"):
            return join_url(url, element.get("href"))
    return url


def join_url(base: str, address: str) -> str:
    """`address` made absolute, or "" when that does not give an http(s) URL."""
    address = re.sub(r"[\t\r\n]", "", address).strip()
    # as browsers do (WHATWG URL, "special" schemes), or one address leads to two places
    path = re.match(r"[^?#]*", address)[0]  # type: ignore[index]  # matches nothing, too
    address = path.replace("\\", "/") + address[len(path) :]
    try:
        joined = urljoin(base, address)
        parts = urlsplit(joined)
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return ""
    return joined.replace(" ", "%20")


def page_metadata(tree: Any, url: str, text: str) -> dict[str, Any]:
    """Whatever the page tells of `url`, `title`, `language` (as declared), `date` (ISO day) and `licence`."""
    metas: dict[str, str] = {}
    for meta in tree.iter("meta"):
        names = (meta.get(key) for key in ("property", "name", "itemprop", "http-equiv"))
        name = next((found.lower() for found in names if found), "")
        if name and (meta.get("content") or "").strip():
            metas.setdefault(name, " ".join(meta.get("content").split()))
    title = next(("".join(t.itertext()) for t in tree.iter("title") if t.getparent().tag == "head"), "")
    language = tree.get("lang") or tree.get("{http://www.w3.org/XML/1998/namespace}lang") or tree.get("xml:lang")
    date = next((metas[n] for n in ("article:published_time", "datepublished", "date", "dc.date") if n in metas), "")
    if not date:
        found = re.search(r'"datePublished"\s*:\s*"([^"]{8,40})"', text) if "datePublished" in text else None
        date = found[1] if found else next((t.get("datetime") for t in tree.iter("time") if t.get("datetime")), "")
    day = re.match(r"\d{4}-\d{2}-\d{2}", date)
    facts = {
        "url": url,
        "title": " ".join((title or metas.get("og:title", "")).split())[:500],
        "language": (language or metas.get("content-language") or metas.get("og:locale") or "").strip()[:20],
        "date": day[0] if day else "",
        # most pages name none, and looking through all links takes longer than through the text
        "licence": _licence(tree, metas, url) if "icense" in text or "creativecommons.org" in text else "",
    }
    return {name: value for name, value in facts.items() if value}


def _licence(tree: Any, metas: Mapping[str, str], url: str) -> str:
    """A link that says `rel=license` first, then meta tags, then any link to a Creative Commons licence."""
    linked = ""
    for element in tree.xpath("descendant::a[@rel or contains(@href, 'creativecommons')] | descendant::link[@rel]"):
        target = element.get("href") or ""
        if "license" in (element.get("rel") or "").lower().split():
            return (join_url(url, target) or target)[:500]
        if not linked and re.match(r"(https?:)?//(www\.)?creativecommons\.org/(licenses|publicdomain)/", target):
            linked = join_url("https://", target) or f"https:{target}"
    return (metas.get("dcterms.license") or metas.get("dc.rights") or metas.get("license") or linked)[:500]


def opt_outs(tree: Any, headers: Mapping[str, str]) -> set[str]:
    """The opt-outs of a page, such as {"noai", "tdm-reservation"}. Header names in lower case."""
    found = header_opt_outs(headers)
    for meta in tree.iter("meta"):
        name, content = (meta.get("name") or meta.get("http-equiv") or "").lower(), (meta.get("content") or "").lower()
        if name in ("robots", "x-robots-tag"):
            found |= _directives(content)
        elif name == "tdm-reservation" and content.strip() == "1":
            found.add("tdm-reservation")
        elif name == "content-usage" and re.search(r"\btrain-(gen)?ai\s*=\s*n\b", content):
            found.add("train-ai=n")
    return found


def header_opt_outs(headers: Mapping[str, str]) -> set[str]:
    """What the headers alone say, of a page or of an image. A header that came several times has several lines."""
    found = set().union(*(_directives(line.lower()) for line in headers.get("x-robots-tag", "").splitlines()))
    if headers.get("tdm-reservation", "").strip() == "1":
        found.add("tdm-reservation")
    if re.search(r"\btrain-(gen)?ai\s*=\s*n\b", headers.get("content-usage", "").lower()):
        found.add("train-ai=n")
    return found


def _directives(line: str) -> set[str]:
    """`noai, noindex` as a set; what follows `somebot:` is for that bot alone."""
    found: set[str] = set()
    for item in line.split(","):
        name, colon, _ = item.partition(":")
        if colon and name.strip() not in ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"):
            break
        found.add(item.strip())
    if "none" in found:
        found.add("noindex")
    return found & {"noai", "noimageai", "noindex", "noimageindex", "noml"}
