"""Plain English prose to measure perplexity on: the paragraphs of Debian's `gnome-user-docs` (CC BY-SA 3.0).

apt-get download gnome-user-docs && dpkg -x gnome-user-docs_*.deb gnome
python examples/english_text.py gnome/usr/share/help/C/gnome-help english.txt
"""

import argparse
from pathlib import Path
from xml.etree import ElementTree

MALLARD = "{http://projectmallard.org/1.0/}"


def paragraphs(page: Path) -> list[str]:
    """The paragraphs of a Mallard page that are sentences, tags removed."""
    found = []
    for element in ElementTree.parse(page).iter(f"{MALLARD}p"):
        text = " ".join("".join(element.itertext()).split())
        if len(text) > 80:
            found.append(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=100_000)
    args = parser.parse_args()
    texts = [text for page in sorted(args.folder.glob("*.page")) for text in paragraphs(page)]
    prose = "\n\n".join(dict.fromkeys(texts))[: args.characters]
    args.out.write_text(prose + "\n", encoding="utf-8")
    print(f"{len(prose):,} characters in {args.out}")


if __name__ == "__main__":
    main()
