"""Personal data and secrets in text, replaced by placeholders: addresses, numbers, keys.

    <EMAIL> <PHONE> <IP_ADDRESS> <CARD> <IBAN> <SSN> <IMEI> <API_KEY>, and https://<CREDENTIALS>@example.com/

Numbers are checked, not only matched: cards by issuer and Luhn's sum, IBANs modulo 97, IP addresses by whether they are
public. A phone number needs a sign of being one: `+` or `00` and a country, a North American or a national pattern with
separators, or a word such as "phone" before it. So dates, versions, ISBNs and prices stay. Names and street addresses
are not found: no pattern tells them.

Every pattern is bounded, so time grows with the length of the text whatever it holds. Scrubbing twice changes nothing.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError

_MAX_PASSES = 8
"""A placeholder may uncover what stood against it. Two passes are the rule; only hostile text needs more."""

_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_DOMAIN = rf"(?:{_LABEL}\.){{1,6}}(?!(?:png|jpe?g|gif|webp|svg|avif|css|js|html?)\b)[^\W\d_]{{2,24}}(?![\w-])"
_AT = r"(?:@|\ ?[\[({]\ ?(?:at|AT)\ ?[\])}]\ ?)"
_EMAIL = re.compile(rf"(?<![\w.%+'-])[\w%+][\w.%+'-]{{0,63}}{_AT}{_DOMAIN}")

_CREDENTIALS = re.compile(r"(?<!\w)([A-Za-z][A-Za-z0-9+.-]{1,20}://)[^\s/@:<>]{1,200}:[^\s/@<>]{0,200}@")
_API_KEY = re.compile(
    r"""(?<![\w-])(?:
      (?:AKIA|ASIA)[A-Z0-9]{16}                       # AWS
    | AIza[\w-]{35}                                   # Google
    | gh[pousr]_[A-Za-z0-9]{36} | github_pat_\w{82}   # GitHub
    | glpat-[\w-]{20}                                 # GitLab
    | hf_[A-Za-z0-9]{34}                              # Hugging Face
    | sk-(?:[a-z]{1,8}\d{0,2}-){0,2}[\w-]{32,200}      # OpenAI, Anthropic, if `_is_drawn`
    | [rs]k_(?:live|test)_[A-Za-z0-9]{20,100}         # Stripe
    | xox[abeoprs]-\d[A-Za-z0-9-]{9,200}              # Slack
    | npm_[A-Za-z0-9]{36}
    | pypi-AgE[\w-]{50,300}
    | SG\.[\w-]{22}\.[\w-]{43}                        # SendGrid
    | eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}  # JSON web token
    )(?![\w-])
    | -----BEGIN\ [A-Z\ ]{0,24}PRIVATE\ KEY-----(?:[^-]|-(?!----)){0,10000}-----END\ [A-Z\ ]{0,24}PRIVATE\ KEY-----
    | (?<=[?&])(?:api_?key|access_token|auth_token|client_secret|password)=[^\s&\#<>]{8,200}
    """,
    re.VERBOSE | re.ASCII,
)

_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:\ ?[A-Z0-9]{4}){2,7}(?:\ ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII)
_CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)", re.ASCII)
_CARD_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}"  # American Express, Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}"  # JCB, Diners Club, UnionPay
)
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])", re.ASCII)
_IMEI = re.compile(r"(?i:\bIMEI)[^\w\n]{0,4}(\d{2}-?\d{6}-?\d{6}-?\d)(?![\w-])", re.ASCII)

_IPV4 = re.compile(r"(?<![\w.-])(?<![A-Za-z]/)\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\d)", re.ASCII)
_BEFORE_VERSION = re.compile(
    r"(?i)(?:\bv|version|release|build|firmware|driver|kernel|update|section|chapter|§|oid)\w{0,3}[\s:.#=]{0,3}$"
)

_PHONE = re.compile(
    r"(?<![\w.,:/=#$€£¥%@+-])(?:\+|\(\+|\+?\()?\d(?:[-\d ().\u00a0\u2010-\u2013/]{4,24})\d(?![\w-]|[.,:]\d|\ ?[%€$£¥])"
)
_BEFORE_PHONE = re.compile(
    r"(?i)(?:\b(?:tel|t[ée]l[ée]ph?on[eo]?|telefone?|phone|ph|mobile?|handy|cell|fax|call(?: us)?(?: at| on)?|whatsapp"
    r"|contact|hotline|sms|тел|телефон|факс)|電話|电话|手机|전화)[\w.]{0,5}[\s:：.#(№-]{0,4}$"
)
_COORDINATES = re.compile(r"[+-]?\d{1,3}\.\d{3,7}(?:[ /]+[+-]?\d{1,3}\.\d{3,7})?")
_DATE = re.compile(r"(?<!\d)(?:\d{1,2}([-./ ])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([-./ ])\d{1,2}\2\d{1,2})(?!\d)")
_INTERNATIONAL = re.compile(r"(?:\+|\(\+|00(?=[1-9]\d? ))")
_NORTH_AMERICAN = re.compile(r"(?:1[-. ])?(?:\([2-9]\d\d\) ?[2-9]\d\d[-. ]|[2-9]\d\d([-.])[2-9]\d\d\1)\d{4}")
_ZIP_CODE = re.compile(r"\d{5}-\d{4}")
_NATIONAL = re.compile(r"\(?0[1-9]\d{0,4}\)?(?:[ /-]{1,3}\d{1,8}){1,4}|0[1-9](?:\.\d\d){4}")
_DASHES = re.compile("[\u2010-\u2013]")


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    text = text.replace(" ", "")
    return 15 <= len(text) <= 34 and int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def _iban(match: re.Match[str]) -> str | None:
    """The IBAN may be followed by a word of capitals, which is not part of it."""
    groups = match[0].split(" ")
    for end in range(len(groups), 0, -1):
        if _is_iban(" ".join(groups[:end])):
            return " ".join(["<IBAN>", *groups[end:]])
    return None


def _card(match: re.Match[str]) -> str | None:
    digits = _digits(match[0])
    groups = re.split("[ -]", match[0])
    is_grouped = all(len(group) >= 4 for group in groups[:-1])
    return "<CARD>" if is_grouped and _CARD_ISSUER.fullmatch(digits) and _luhn(digits) else None


def _imei(match: re.Match[str]) -> str | None:
    return match[0].replace(match[1], "<IMEI>") if _luhn(_digits(match[1])) else None


def _ip_address(match: re.Match[str]) -> str | None:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    # 1.16.3.2 is a section or a version. Few addresses look so, and 1.1.1.1 or 8.8.8.8 are nobody's own.
    is_numbering = address.version == 4 and max(address.packed) < 32
    is_version = _BEFORE_VERSION.search(match.string[max(0, match.start() - 20) : match.start()])
    return None if is_numbering or is_version or not address.is_global else "<IP_ADDRESS>"


def _phone(match: re.Match[str]) -> str | None:
    number = _DASHES.sub("-", match[0].replace("\u00a0", " "))
    opening = "(" if number[0] == "(" and number.count("(") > number.count(")") else ""  # (all of it in brackets)
    number = number.removeprefix(opening)
    digits = _digits(number)
    if not 7 <= len(digits) <= 15 or _DATE.search(number) or _ZIP_CODE.fullmatch(number):
        return None
    if number.count("(") != number.count(")") or _COORDINATES.fullmatch(number):
        return None
    before = match.string[max(0, match.start() - 24) : match.start()]
    if re.search(r"(?i)\bisbn\w{0,3}[\s:-]{0,3}$", before):
        return None
    is_phone = (
        (_INTERNATIONAL.match(number) and len(digits) >= 8)
        or _NORTH_AMERICAN.fullmatch(number)
        or (_NATIONAL.fullmatch(number) and 9 <= len(digits) <= 12)
        or _BEFORE_PHONE.search(before)
    )
    return f"{opening}<PHONE>" if is_phone else None


def _always(placeholder: str, match: re.Match[str]) -> str:
    return placeholder


def _credentials(match: re.Match[str]) -> str:
    return f"{match[1]}<CREDENTIALS>@"


_BEFORE_KEY = re.compile(r"sk-(?:[a-z]{1,8}\d{0,2}-){0,2}")
_HEXADECIMAL = re.compile(r"(?=.*\d)[0-9a-f]{32,}")


def _is_drawn(key: str) -> bool:
    """Whether what stands behind `sk-` was drawn at random, and is no list of words as in the address of a page."""
    secret = key[_BEFORE_KEY.match(key).end() :]  # type: ignore[union-attr]
    kinds = (str.islower, str.isupper, str.isdigit)
    return bool(_HEXADECIMAL.fullmatch(secret)) or all(any(map(kind, secret)) for kind in kinds)


def _api_key(match: re.Match[str]) -> str | None:
    if match[0].startswith("sk-") and not _is_drawn(match[0]):
        return None
    name, equals, _ = match[0].partition("=")
    is_parameter = equals and name.islower() and "-" not in name
    return f"{name}=<API_KEY>" if is_parameter else "<API_KEY>"


_RULES: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]]] = {
    # In this order: a password may look like an e-mail address, a card's number holds a phone number.
    "credentials": (_CREDENTIALS, _credentials),
    "API key": (_API_KEY, _api_key),
    "e-mail": (_EMAIL, partial(_always, "<EMAIL>")),
    "IBAN": (_IBAN, _iban),
    "card": (_CARD, _card),
    "SSN": (_SSN, partial(_always, "<SSN>")),
    "IMEI": (_IMEI, _imei),
    "IP address": (_IPV4, _ip_address),
    "IPv6 address": (_IPV6, _ip_address),
    "phone": (_PHONE, _phone),
}
KINDS = tuple(_RULES)
"""What is found. `scrub` counts by these names."""


def scrub(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, Counter[str]]:
    """(the text with placeholders, how many of each kind)."""
    found: Counter[str] = Counter()
    for _ in range(_MAX_PASSES):
        before = found.total()
        for kind in kinds:
            text = _replace(text, kind, found)
        if found.total() == before:
            break
    return text, found


def _replace(text: str, kind: str, found: Counter[str]) -> str:
    pattern, placeholder_of = _RULES[kind]

    def replacement(match: re.Match[str]) -> str:
        placeholder = placeholder_of(match)
        found[kind] += placeholder is not None
        return match[0] if placeholder is None else placeholder

    return pattern.sub(replacement, text)


@dataclass(frozen=True, kw_only=True)
class PersonalData:
    """Replaces personal data in a document's texts and its images' alternative texts. Metadata stays as it is."""

    kinds: tuple[str, ...] = KINDS
    name: str = "personal data"

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if isinstance(self.kinds, str) or unknown:
            raise ConfigError(f"kinds: {self.kinds!r}: known are {', '.join(KINDS)}")

    def __call__(self, document: Document, removed: Counter[str]) -> Document:
        segments = self._scrubbed(document.segments, removed)
        branches = tuple(self._scrubbed(branch, removed) for branch in document.branches)
        return replace(document, segments=segments, branches=branches)

    def _scrubbed(self, segments: tuple[Segment, ...], removed: Counter[str]) -> tuple[Segment, ...]:
        return tuple(self._scrub(segment, removed) for segment in segments)

    def _scrub(self, segment: Segment, removed: Counter[str]) -> Segment:
        old = segment.text if isinstance(segment, Text) else segment.alt
        new, found = scrub(old, self.kinds)
        removed.update({f"personal data: {kind}": count for kind, count in found.items() if count})
        if new == old:
            return segment
        return replace(segment, alt=new) if isinstance(segment, Image) else replace(segment, text=new)
