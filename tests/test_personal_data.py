"""Personal data: what is replaced, what must stay, and how long hostile text takes."""

import pickle
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.filters.personal_data import KINDS, PersonalData, scrub
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError

HIDDEN = [
    ("e-mail", "Write to jane.doe+news@mail.example.co.uk.", "Write to <EMAIL>."),
    ("e-mail", "Jane <jane@example.com>, Jörg: jörg@müller.de", "Jane <<EMAIL>>, Jörg: <EMAIL>"),
    ("e-mail", "jane (at) example.com", "<EMAIL>"),
    ("phone", "Call +44 20 7946 0958 now", "Call <PHONE> now"),
    ("phone", "+1 (212) 555-0123, +49-30-901820, +(49) 30 901820", "<PHONE>, <PHONE>, <PHONE>"),
    ("phone", "(212) 555-0123 or 1-800-555-0199", "<PHONE> or <PHONE>"),
    ("phone", "Paris 01 42 68 53 00, Berlin 030/901820-0", "Paris <PHONE>, Berlin <PHONE>"),
    ("phone", "Tel.: 612 345 678; 電話 0312345678", "Tel.: <PHONE>; 電話 <PHONE>"),
    ("phone", "Office (+49-30-901820), (030 3258561), (+7 (495) 854-57-94)", "Office (<PHONE>), (<PHONE>), (<PHONE>)"),
    ("phone", "电话：138 8529 6592", "电话：<PHONE>"),
    ("IP address", "from 93.184.216.34 at noon", "from <IP_ADDRESS> at noon"),
    ("IPv6 address", "from 2606:2800:220:1:248:1893:25c8:1946.", "from <IP_ADDRESS>."),
    ("card", "Visa 4111 1111 1111 1111, Amex 378282246310005", "Visa <CARD>, Amex <CARD>"),
    ("IBAN", "IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN <IBAN> BIC COBADEFF"),
    ("IBAN", "GB82WEST12345698765432", "<IBAN>"),
    ("IBAN", "BE68 5390 0754 7034 BANK", "<IBAN> BANK"),
    ("SSN", "SSN 123-45-6789", "SSN <SSN>"),
    ("IMEI", "IMEI: 490154203237518", "IMEI: <IMEI>"),
    ("credentials", "ftp://jane:s3cret@example.com/x", "ftp://<CREDENTIALS>@example.com/x"),
    ("API key", "key AKIAIOSFODNN7EXAMPLE", "key <API_KEY>"),
    ("API key", "ghp_" + "a1B2" * 9, "<API_KEY>"),
    ("API key", "sk-" + "a1B2" * 12, "<API_KEY>"),
    ("API key", "key sk-ant-api03-" + "aB3-xY_9" * 11 + "AA.", "key <API_KEY>."),
    ("API key", "sk-or-v1-" + "0a1b2c3d" * 8 + " sk-" + "9f8e" * 8, "<API_KEY> <API_KEY>"),
    ("API key", "xoxb-123456789012-abcDEF", "<API_KEY>"),
    ("API key", "https://x.org/?api_key=0123456789abcdef&q=1", "https://x.org/?api_key=<API_KEY>&q=1"),
    ("API key", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<API_KEY>"),
]

OVERLAPPING = {"credentials": ("credentials", "e-mail"), "card": ("card", "phone"), "IMEI": ("IMEI", "phone")}
"""The first rule keeps the second from seeing the text."""

KEPT = [
    "On 2023-01-15, 15.01.2023, 01/15/2023 10:30 and 1999 - 2004",
    "Version 10.0.19041.1 of the driver, v1.12.10.200, Chrome/109.0.0.0, section 1.2.3.4",
    "Boston, MA 02110-1301, clause 252.227-7013 (c), tests 571 612 1056 failed, 1.16.3.2. Isotonic, 2.3.10.5 Scores",
    "ISBN 0-306-40615-2, ISBN-13: 978-0-306-40615-7, 978-3-16-148410-0",
    "It costs $1,234,567.89, 12 345 678 €, 1.234.567,00 EUR or 100000000 yen",
    "localhost 127.0.0.1, 192.168.0.12 and 10.20.30.40, mask 255.255.255.0",
    "4111 1111 1111 1112 fails Luhn's sum, 1234 5678 9012 3456 has no issuer",
    "DE89 3704 0044 0532 0130 01 fails modulo 97",
    "000-12-3456, 666-12-3456 and 987-65-4321 were never issued",
    "sprite@2x.png, package@1.2.3, @someone, a @ b",
    "std::vector, 12:30:45, aa::bb, 192.168.1.1:8080",
    "Order 123456789012, x + 1023) / 1024, 1 + 2000 4000, pages 100-200, 3.14159265358979, 2 000 000 people, 640x480",
    "https://example.com:8080/a@b, https://example.com/2023/01/15/123456789",
    "https://example.com/sk-how-to-make-the-best-bread-at-home-20240115",
    "https://example.com/p/sk-learn-pipelines-with-four-simple-steps-and-2-tricks, SK-hynix-memory-in-the-news",
    "xoxo-love-from-all-of-us-at-home",
    "+48.8584 -2.2945, +48.85837, +102.29448",
    "DOI 10.1000/182, arXiv 2302.14045, GPS 48.858370, 2.294481, -33.856784",
]


@pytest.mark.parametrize(("kind", "text", "expected"), HIDDEN)
def test_each_kind_is_replaced_alone(kind: str, text: str, expected: str) -> None:
    scrubbed, found = scrub(text)
    assert scrubbed == expected
    assert {name for name, count in found.items() if count} == {kind}
    others = tuple(other for other in KINDS if other not in OVERLAPPING.get(kind, (kind,)))
    assert scrub(text, others)[0] == text, "another rule finds it as well"


@pytest.mark.parametrize("text", KEPT)
def test_ordinary_numbers_stay(text: str) -> None:
    assert scrub(text)[0] == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*[text for _, text, _ in HIDDEN], *KEPT, "@", ".", "-", "1", "a", ":", "/", " "])))
def test_scrubbing_twice_changes_nothing(pieces: list[str]) -> None:
    once, _ = scrub("".join(pieces))
    assert scrub(once) == (once, Counter(dict.fromkeys(scrub(once)[1], 0)))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab1290+-.:/@() <>DE", max_size=60))
def test_scrubbing_twice_changes_nothing_in_noise(text: str) -> None:
    once, _ = scrub(text)
    assert scrub(once)[0] == once


UNITS = ["a", "1", "1 ", "a.", "a-", "a@", "@a.", "a@a.", "1.", "1.1.", "2001:", "0:", "+1 ", "(1) ", "00 ", "DE89 "]
UNITS += ["A1B2 ", "http://a:", "eyJ", "eyJaaaaaaaaaaa.", "sk-", "-", "tel ", "tel 1", "IMEI ", "4111 ", "?password="]
UNITS += ["-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----a", "://", "+", "xox-", "_", "a@b[at]", "<", "é"]


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: str) -> None:
    """Stops patterns that try every start against every end: 200 kB of one unit took minutes so."""
    text = (unit * 200_000)[:200_000]
    start = time.process_time()
    scrub(text)
    assert time.process_time() - start < 5


def test_stage_counts_and_keeps_the_rest() -> None:
    image = Image("photo.jpg", alt="mail me@example.com")
    text = Text("Phone: 555 1234 567", is_target=False)
    document = Document((text, image), branches=((Text("a@example.com"),),), metadata={"url": "http://x"})
    removed: Counter[str] = Counter()
    stage = pickle.loads(pickle.dumps(PersonalData()))
    out = stage(document, removed)
    assert out.segments == (Text("Phone: <PHONE>", is_target=False), Image("photo.jpg", alt="mail <EMAIL>"))
    assert out.branches == ((Text("<EMAIL>"),),)
    assert removed == {"personal data: e-mail": 2, "personal data: phone": 1}
    assert out.metadata == document.metadata


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="known are credentials"):
        PersonalData(kinds=("names",))
