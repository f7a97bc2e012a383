"""What the scrubber of personal data finds, and what it spoils, on a made set.

Every line is a short text that holds one thing: personal data, in the forms that people write it in, or something that
only looks like it. Personal data counts as found when its placeholder stands in its place and all else is as it was; a
lookalike counts as spoiled when anything changed. Nothing is real: all are drawn at random, with right check digits.

    python examples/benchmarks/personal_data.py
    python examples/benchmarks/personal_data.py --count 1000 --out result.json
"""

import argparse
import ipaddress
import json
import string
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from mm_gpt.datasets.filters.personal_data import scrub

ALNUM = string.ascii_letters + string.digits
FRAMES = (
    "{}",
    "{}.",
    "See {} for more.",
    "It was {}, they said",
    "({})",
    "“{}”",
    "first line\n{}\nlast line",
    "a: {};",
)
FIRST = ("jane", "john", "maria", "wei", "ahmed", "olga", "kenji", "fatima", "lucas", "anna")
LAST = ("doe", "smith", "garcia", "chen", "khan", "ivanova", "tanaka", "silva", "mueller", "rossi")
WORDS = ("how", "to", "make", "the", "best", "bread", "at", "home", "with", "four", "simple", "things", "learn", "cook")
WORDS += (
    "travel",
    "guide",
    "winter",
    "review",
    "of",
    "new",
    "phone",
    "camera",
    "old",
    "city",
    "walk",
    "garden",
    "paint",
)


def digits(chance: Random, count: int) -> str:
    return "".join(chance.choices(string.digits, k=count))


def text(chance: Random, count: int, letters: str = ALNUM) -> str:
    return "".join(chance.choices(letters, k=count))


def filled(chance: Random, pattern: str) -> str:
    """`#` is any digit, `N` one from 2 to 9."""
    return "".join({"#": digits(chance, 1), "N": chance.choice("23456789")}.get(char, char) for char in pattern)


def slug(chance: Random, words: int) -> str:
    return "-".join(chance.choices(WORDS, k=words))


# ---- personal data ----


def email(chance: Random) -> str:
    first, last = chance.choice(FIRST), chance.choice(LAST)
    name = chance.choice([first, f"{first}.{last}", f"{first[0]}{last}{digits(chance, 2)}", f"{first}_{last}+news"])
    domain = chance.choice(["example.com", "mail.example.org", "example.co.uk", "müller-example.de", "example.museum"])
    return name + chance.choice(["@", "@", "@", "@", " (at) ", "[at]", " [AT] "]) + domain


# As people of each country write them.
INTERNATIONAL = ("+1 N## N## ####", "+1-N##-N##-####", "+1.N##.N##.####", "+44 20 7### ####", "+44 (0)20 7### ####")
INTERNATIONAL += ("+49 30 N#####", "+49-17#-N######", "0049 30 N#####", "+33 1 N# ## ## ##", "+34 6## ### ###")
INTERNATIONAL += ("+39 06 N### ####", "+81 3-N###-####", "+86 138 #### ####", "+91 98### #####", "+55 11 9####-####")
INTERNATIONAL += ("+7 (495) N##-##-##", "+3120N######", "+61 2 N### ####")
NATIONAL = ("(N##) N##-####", "N##-N##-####", "N##.N##.####", "1-800-N##-####", "020 7### ####", "07700 N#####")
NATIONAL += ("030 N######", "030/N#####", "0170-N######", "01 N# ## ## ##", "01.N#.##.##.##", "03-N###-####")
NATIONAL += ("090-N###-####", "(02) N### ####", "0800 N## ###")
UNMARKED = ("6## ### ###", "98### #####", "138 #### ####", "N### ####", "N#########")
"""In these only a word before them tells that they are one."""
LABELLED = ("Tel. {}", "Phone: {}", "call {}", "Fax {}", "mobile {}", "WhatsApp: {}", "电话：{}", "тел. {}")


def phone(chance: Random) -> str:
    """What tells a phone number is in the number itself."""
    return filled(chance, chance.choice(INTERNATIONAL + NATIONAL))


def labelled_phone(chance: Random) -> tuple[str, str]:
    return chance.choice(LABELLED), filled(chance, chance.choice(UNMARKED))


def ipv4(chance: Random) -> str:
    while not (address := ipaddress.IPv4Address(chance.getrandbits(32))).is_global or address.is_multicast:
        pass
    return str(address)


def ipv6(chance: Random) -> str:
    value = (0x2600 << 112) + (chance.getrandbits(32) << 80) + chance.getrandbits(chance.choice([16, 64, 80]))
    address = ipaddress.IPv6Address(value)
    return chance.choice([address.compressed, address.exploded])


def luhn(number: str) -> str:
    """The number with its check digit."""
    total = sum(sum(divmod(int(d) * (2 - n % 2), 10)) for n, d in enumerate(reversed(number)))
    return number + str(-total % 10)


def grouped(number: str, chance: Random, sizes: tuple[int, ...] = (4, 4, 4, 4)) -> str:
    mark, parts = chance.choice(["", " ", "-"]), []
    for size in sizes:
        parts.append(number[:size])
        number = number[size:]
    return mark.join(part for part in [*parts, number] if part)


def card(chance: Random) -> str:
    start, length = chance.choice([("4", 16), ("53", 16), ("2250", 16), ("37", 15), ("6011", 16), ("3530", 16)])
    number = luhn(start + digits(chance, length - len(start) - 1))
    return grouped(number, chance, (4, 6, 5) if length == 15 else (4, 4, 4, 4))


def iban(chance: Random) -> str:
    country, bank, size = chance.choice(
        [("DE", "", 18), ("FR", "", 23), ("GB", "WEST", 14), ("ES", "", 20), ("NL", "ABNA", 10)]
    )
    body = bank + digits(chance, size)
    check = 98 - int("".join(str(int(char, 36)) for char in f"{body}{country}00")) % 97
    whole = f"{country}{check:02}{body}"
    return chance.choice([whole, " ".join(whole[at : at + 4] for at in range(0, len(whole), 4))])


KEYS: dict[str, Callable[[Random], str]] = {
    "AWS": lambda c: "AKIA" + text(c, 16, string.ascii_uppercase + string.digits),
    "Google": lambda c: "AIza" + text(c, 35, ALNUM + "-_"),
    "GitHub": lambda c: c.choice(["ghp_", "gho_"]) + text(c, 36),
    "GitLab": lambda c: "glpat-" + text(c, 20),
    "Hugging Face": lambda c: "hf_" + text(c, 34, string.ascii_letters),
    "OpenAI": lambda c: c.choice(["sk-" + text(c, 48), "sk-proj-" + text(c, 120, ALNUM + "-_") + "A"]),
    "Anthropic": lambda c: f"sk-ant-api03-{text(c, 93, ALNUM + '-_')}AA",
    "of hexadecimal digits": lambda c: c.choice(
        ["sk-" + text(c, 32, "0123456789abcdef"), "sk-or-v1-" + text(c, 64, "0123456789abcdef")]
    ),
    "Stripe": lambda c: c.choice(["sk_live_", "rk_test_"]) + text(c, 24),
    "Slack": lambda c: f"xoxb-{digits(c, 12)}-{digits(c, 12)}-{text(c, 24)}",
    "JSON web token": lambda c: f"eyJ{text(c, 33)}.eyJ{text(c, 60)}.{text(c, 43)}",
}
PERSONAL: dict[str, tuple[str, Callable[[Random], str | tuple[str, str]]]] = {
    "e-mail": ("<EMAIL>", email),
    "phone": ("<PHONE>", phone),
    "phone, a word before it": ("<PHONE>", labelled_phone),
    "phone, nothing tells it": ("<PHONE>", lambda c: filled(c, c.choice(UNMARKED))),
    "IPv4": ("<IP_ADDRESS>", ipv4),
    "IPv6": ("<IP_ADDRESS>", ipv6),
    "card": ("<CARD>", card),
    "IBAN": ("<IBAN>", iban),
    "SSN": ("<SSN>", lambda c: f"{c.randint(1, 665):03}-{c.randint(1, 99):02}-{c.randint(1, 9999):04}"),
    "key": ("<API_KEY>", lambda c: c.choice(list(KEYS.values()))(c)),
}

# ---- what only looks like it ----


def isbn(chance: Random) -> str:
    body = "978" + digits(chance, 9)
    check = -sum(int(d) * (3 if n % 2 else 1) for n, d in enumerate(body)) % 10
    whole = f"{body}{check}"
    return chance.choice(["", "ISBN ", "ISBN-13: "]) + chance.choice(
        [
            whole,
            f"{whole[:3]}-{whole[3]}-{whole[4:7]}-{whole[7:12]}-{whole[12]}",
            f"{whole[3]}-{whole[4:7]}-{whole[7:12]}-X",
        ]
    )


def date(chance: Random) -> str:
    year, month, day = chance.randint(1900, 2029), chance.randint(1, 12), chance.randint(1, 28)
    hour, minute = chance.randint(0, 23), chance.randint(0, 59)
    return chance.choice(
        [
            f"{year}-{month:02}-{day:02}",
            f"{day:02}.{month:02}.{year}",
            f"{month}/{day}/{year}",
            f"{day:02}-{month:02}-{year}",
            f"{year}{month:02}{day:02}",
            f"{year}-{month:02}-{day:02} {hour:02}:{minute:02}",
            f"{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:00Z",
            f"{year}-{year + 5}",
            f"{day:02}.{month:02}.{year} - {day:02}.{month:02}.{year + 1}",
            f"{day:02} {month:02} {year}",
        ]
    )


def version(chance: Random) -> str:
    numbers = [chance.randint(0, 20) for _ in range(chance.randint(3, 4))]
    plain = ".".join(map(str, numbers))
    return chance.choice(
        [
            plain,
            f"v{plain}",
            f"version {chance.randint(30, 99)}.{plain}",
            f"10.0.{chance.randint(10000, 22000)}.{chance.randint(1, 999)}",
            f"Chrome/{chance.randint(60, 140)}.0.{chance.randint(1000, 6000)}.{chance.randint(0, 200)}",
            f"foo@{plain}",
            f"foo-{plain}.tar.gz",
        ]
    )


def hashed(chance: Random) -> str:
    hexadecimal = text(chance, chance.choice([7, 12, 32, 40, 64]), "0123456789abcdef")
    return chance.choice(
        [
            hexadecimal,
            hexadecimal,
            str(uuid.UUID(int=chance.getrandbits(128))),
            f"sha256:{text(chance, 64, '0123456789abcdef')}",
        ]
    )


def coordinates(chance: Random) -> str:
    latitude, longitude = chance.uniform(0, 90), chance.uniform(0, 180)
    minutes, seconds = chance.randint(0, 59), chance.randint(0, 59)
    return chance.choice(
        [
            f"{latitude:.6f}, {-longitude:.6f}",
            f"{-latitude:.4f},{longitude:.4f}",
            f"geo:{latitude:.5f},{longitude:.5f}",
            f"+{latitude:.4f} -{longitude:.4f}",
            f"+{latitude:.5f}, +{longitude:.5f}",
            f"{latitude:.0f}°{minutes}'{seconds}\"N {longitude:.0f}°{seconds}'{minutes}\"E",
        ]
    )


def address(chance: Random) -> str:
    words = slug(chance, chance.randint(5, 12))
    path = chance.choice(
        [words, f"sk-{words}", f"{words}-{digits(chance, 8)}", f"sk-{words}-{digits(chance, 10)}", f"xoxo-{words}"]
    )
    return f"https://www.example.com/{chance.choice(['', '2023/01/15/', 'p/'])}{path}"


def number(chance: Random) -> str:
    return chance.choice(
        [
            f"{chance.randint(10**6, 10**9):,}",
            f"${chance.randint(1000, 10**6):,}.{digits(chance, 2)}",
            digits(chance, 10),
            digits(chance, 12),
            f"{chance.randint(1, 999)} {digits(chance, 3)} {digits(chance, 3)} people",
            f"pages {chance.randint(100, 200)}-{chance.randint(201, 400)}",
            f"order {digits(chance, 9)}",
            f"{chance.randint(100, 999)}x{chance.randint(100, 999)}",
            f"3.14159{digits(chance, 8)}",
            f"{digits(chance, 5)}-{digits(chance, 4)}",
            f"part {digits(chance, 3)}-{digits(chance, 5)}-{digits(chance, 2)}",
            f"£{digits(chance, 3)} {digits(chance, 3)}",
        ]
    )


def failing(chance: Random) -> str:
    """Numbers of a card, an account or a machine that are none."""
    wrong = card(chance)
    wrong = wrong[:-1] + str((int(wrong[-1]) + 1) % 10)
    other = iban(chance)
    other = other[:2] + f"{(int(other[2:4]) + 1) % 97:02}" + other[4:]
    private = f"{chance.choice(['10', '192.168', '172.16'])}.{chance.randint(0, 255)}.{chance.randint(0, 255)}"
    private += f".{chance.randint(0, 255)}" if private.startswith("10.") else ""
    return chance.choice(
        [
            wrong,
            other,
            private,
            f"{chance.choice(['000', '666', '900'])}-{digits(chance, 2)}-{digits(chance, 4)}",
            "127.0.0.1",
            "fe80::1",
        ]
    )


def code(chance: Random) -> str:
    return chance.choice(
        [
            "@app.route",
            "std::vector::size",
            "sprite@2x.png",
            f"user_{digits(chance, 4)} @ home",
            "@someone",
            "a[1:2:3]",
            f"12:{digits(chance, 2)}:45",
            f"IMG_2023{digits(chance, 4)}_{digits(chance, 6)}.jpg",
            f"#{text(chance, 6, '0123456789abcdef')}",
            f"0x{text(chance, 8, '0123456789abcdef')}",
            f"00:1a:2b:{text(chance, 2, 'abcdef')}:4d:5e",
            f"doi:10.1000/{digits(chance, 6)}",
            f"arXiv:{digits(chance, 4)}.{digits(chance, 5)}",
            "sk-learn",
            "@scope/name@^1.2.3",
        ]
    )


LOOKALIKES: dict[str, Callable[[Random], str]] = {
    "version": version,
    "ISBN": isbn,
    "date": date,
    "address of a page": address,
    "hash": hashed,
    "coordinates": coordinates,
    "other number": number,
    "failed check or private": failing,
    "code": code,
}


def measure(count: int, seed: int) -> dict[str, Any]:
    chance = Random(seed)
    found, spoiled, replaced = {}, {}, Counter[bool]()
    examples: dict[str, list[str]] = {}
    for kind, (placeholder, make) in tqdm(PERSONAL.items(), desc="personal data"):
        right = 0
        for _ in range(count):
            thing = make(chance)
            frame, thing = thing if isinstance(thing, tuple) else (chance.choice(FRAMES), thing)
            scrubbed = scrub(frame.replace("{}", thing))[0]
            is_right = scrubbed == frame.replace("{}", placeholder)
            right += is_right
            if scrubbed != frame.replace("{}", thing):
                replaced[is_right] += 1
            if not is_right:
                examples.setdefault(kind, []).append(f"{frame.replace('{}', thing)} -> {scrubbed}")
        found[kind] = right / count
    for kind, make_other in tqdm(LOOKALIKES.items(), desc="lookalikes"):
        wrong = 0
        for _ in range(count):
            line = chance.choice(FRAMES).replace("{}", make_other(chance))
            scrubbed = scrub(line)[0]
            if scrubbed != line:
                wrong += 1
                replaced[False] += 1
                examples.setdefault(kind, []).append(f"{line} -> {scrubbed}")
        spoiled[kind] = wrong / count
    return {
        "what": " ".join((__doc__ or "").split("\n\n    python")[0].split()),
        "seed": seed,
        "lines_of_each_kind": count,
        "recall": sum(found.values()) / len(found),
        "precision": replaced[True] / replaced.total(),
        "found": found,
        "spoiled": spoiled,
        "examples_of_errors": {kind: lines[:5] for kind, lines in examples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="lines of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result = measure(args.count, args.seed)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for part in ("found", "spoiled"):
        for kind, share in result[part].items():
            print(f"{part:8} {kind:24} {100 * share:6.1f} %")
    print(f"recall {100 * result['recall']:.1f} %, precision {100 * result['precision']:.1f} %")


if __name__ == "__main__":
    main()
