"""Penn Treebank tokens of a caption, as the COCO caption metrics count them, without Java.

CIDEr, BLEU and ROUGE-L of COCO are defined on the output of Stanford's PTBTokenizer (CoreNLP 3.4.1, options
`-preserveLines -lowerCase`), from which pycocoevalcap then removes 17 punctuation tokens. A different tokenizer gives
different scores. This is an independent reimplementation, built and checked against the output of that program, not
against its source. Two habits of the original are kept on purpose because they change scores:

- Brackets become `-lrb-`, `-rrb-`, ... and stay: the original removes `-LRB-`, after lower-casing everything.
- Runs of `!` and `?` longer than one (`!!`, `?!`) stay, single ones go.

Vowel signs and accents that are characters of their own are parts of words. The original knows those of most scripts,
but drops them in a few (Kannada, Sinhala, Khmer, Burmese), where different words become one; that is not reproduced.

Not reproduced either: the original lexes all captions as one file, so that the first word of the next caption can
matter to the last token of this one ("vitamin b." before "The ..."); here every caption stands alone. Rare forms differ
too, such as phone numbers in groups divided by spaces.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache


def _words(text: str) -> list[str]:
    return text.split()


_PUNCTUATION = frozenset(_words("'' ' `` ` . ? ! , : - -- ... ;"))  # the bracket names of the original never match

_LETTER = r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b]"  # `\w` has fractions and superscripts
_ALNUM = rf"(?:{_LETTER}|\d)"
_END = rf"(?!{_ALNUM})"

# Abbreviations that own their full stop. The second list needs a capital, because the plain words are common.
_ABBREVIATIONS = _words(
    """
    adm al ala apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cie cmdr co col colo
    comdr conn corp cos cpl ct dec dept det dr drs esq est etc ext feb fla fri ft ga gen gov hon inc ind insp
    intl jan jr jul jun kan kans ky lt ltd maj mar md messrs mich minn mlle mme mo mon mr mrs ms msgr mt natl
    neb nev nov oct okla penn ph plc pres prof pvt rd rep rev rt sen sep sept seq sgt sq sr st ste supt tel tenn
    thu thurs treas tue tues univ va vs vt wed wis wisc wyo
    """
)
_CAPITAL_ABBREVIATIONS = _words("Ark Del Ill La Mass Miss Mont Ore Pa Tex Wash Wva")
_NUMBERED_ABBREVIATIONS = _words("art ca fig figs no nos op pp prop")  # only before a number
# After a single letter and a full stop ("plan b. The ...") these start a sentence, others do not ("J. Doe").
_SENTENCE_STARTS = _words(
    """
    A About According Additionally After An As At But He Her Here However If In It Last Many Mr. Ms. Now One
    Once Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
    """
)
_APOSTROPHE_WORDS = _words("ma'am o'clock o'er e'er ne'er hawai'i d'you 'em 'cause 'til 'till")
_ASSIMILATED = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "wanna": "wan na",
    "'tis": "'t is",
    "'twas": "'t was",
}
_CURRENCY = {"£": "#", "€": "$", "¢": "cents"}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}


def _one_of(words: list[str] | dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in words)


def _same(token: str) -> str:
    return token


def _round_brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _join_spaces(token: str) -> str:
    """Tokens of several words hold no-break spaces; BLEU and CIDEr split there again, ROUGE-L does not."""
    return re.sub(r"\s", "\u00a0", _round_brackets(token))


_CLITIC = r"'(?:s|m|d|re|ve|ll)"
_Rule = tuple[re.Pattern[str], Callable[[str], str]]


def _rule(pattern: str, action: Callable[[str], str] = _same, flags: int = re.IGNORECASE) -> _Rule:
    return re.compile(pattern, flags), action


# The longest match wins, the earlier rule at equal length.
_RULES: list[_Rule] = [
    _rule(r"</?[a-z!][^<>]*>", _join_spaces),
    _rule(_one_of(_ENTITIES), lambda token: _ENTITIES[token.lower()]),
    _rule(rf"(?:{_one_of(_ASSIMILATED)}){_END}", lambda token: _ASSIMILATED[token.lower()]),
    _rule(rf"{_LETTER}*n't{_END}", lambda token: f"{token[:-3]} n't"),
    _rule(rf"{_CLITIC}(?!{_LETTER})"),
    _rule(rf"'n'|'n{_END}"),
    _rule(rf"y'(?={_LETTER})"),
    _rule(rf"(?:{_one_of(_APOSTROPHE_WORDS)}){_END}"),
    _rule(rf"[dol]'(?!(?:s|m|d|re|ve|ll){_END}){_LETTER}+"),
    _rule(r"'\d\ds?(?![\w\"'])"),
    # Words, also hyphenated ones, and words joined by a full stop without a space (`dog.Next`, `foo.com`).
    _rule(rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"),
    _rule(rf"(?:\d+(?:[.,]\d+)+-)?{_ALNUM}+(?:[-_\u2010\u2011]{_ALNUM}+)*"),
    _rule(rf"[a-z](?:\.[a-z])+\.?(?:-{_ALNUM}+)*"),
    _rule(r"ph\.d\."),
    _rule(rf"[a-z]\.(?!\s+(?-i:{_one_of(_SENTENCE_STARTS + [w.upper() for w in _SENTENCE_STARTS])})(?:\s|$))"),
    _rule(rf"(?:{_one_of(_ABBREVIATIONS)})\."),
    _rule(rf"(?:{_one_of(_CAPITAL_ABBREVIATIONS + [a.upper() for a in _CAPITAL_ABBREVIATIONS])})\.", flags=0),
    _rule(rf"(?:{_one_of(_NUMBERED_ABBREVIATIONS)})\.(?=\s*\d)"),
    _rule(rf"{_LETTER}+\.(?=[,;:])"),
    _rule(rf"{_ALNUM}+(?:-{_ALNUM}+)*(?:/{_ALNUM}+(?:-{_ALNUM}+)*)+"),
    _rule(r"[A-Z]+(?:&[A-Z]+)+", flags=0),
    # Numbers.
    _rule(r"[-+]?(?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)"),
    _rule(r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", _join_spaces),
    _rule(r"\(\d{3}\) ?\d{3}[- ]\d{4}", _join_spaces),
    _rule(r"\d{3} \d{3}[- ]\d{4}", _join_spaces),
    # Addresses and names of the net.
    _rule(r"https?://[^\s<>\"]*[^\s<>\".,;:!?'()\[\]{}]"),
    _rule(r"(?:www\.)?[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:com|net|org|edu)(?:/[^\s<>\"]*[^\s<>\".,;:!?'()])?"),
    _rule(rf"{_ALNUM}[\w.+-]*@{_ALNUM}+(?:[.-]{_ALNUM}+)*"),
    _rule(r"@[a-z_]\w*|#[a-z_]+"),
    _rule(r"[<>]?[:;=][-o*']?[()DP\]\[](?!\w)", _round_brackets, 0),
    _rule(r"\^_\^|c\+\+|[cf]#"),
    _rule(r"(?:US|HK|A|C)\$", flags=0),
    # Marks.
    _rule(r"\.\.\.|\. \. \.|\u2026", lambda token: "..."),
    _rule(r"--{1,3}(?!-)|[\u2013\u2014]", lambda token: "--"),
    _rule(r"-{5,}|_+|\*+|#+|~+|[?!]+|@+|>>|<<"),
    _rule(_one_of(_CURRENCY), lambda token: _CURRENCY[token]),
    _rule(_one_of(_FRACTIONS), lambda token: _FRACTIONS[token]),
    _rule(_one_of(_BRACKETS), lambda token: _BRACKETS[token]),
    _rule(r"''|``|[\"\u201c\u201d\u00ab\u00bb]", lambda token: "''"),
    _rule(r"['`\u2018\u2039\u203a]", lambda token: "'"),
]
_SPACE = re.compile(r"\s+")
_PLAIN_WORD = re.compile(rf"(?!(?:{_one_of(_ASSIMILATED)})\b)[a-z]+(?=[\s,]|$)", re.IGNORECASE)


def ptb_tokenize(caption: str) -> str:
    """The caption's lower-cased Penn Treebank tokens without punctuation, joined by single spaces."""
    text = caption.replace("\u2019", "'").replace("\u0092", "'")
    shape = text if text.isascii() else text.translate(_marks_as_letters())  # what the rules see
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if space := _SPACE.match(shape, position):
            position = space.end()
        elif word := _PLAIN_WORD.match(shape, position):  # most of a caption; the rules below would say the same
            tokens.append(text[position : word.end()].lower())
            position = word.end()
        else:
            action, end = _longest_match(shape, position)
            tokens += action(text[position:end]).lower().split(" ")
            position = end
    return " ".join(token for token in tokens if token and token not in _PUNCTUATION)


def _longest_match(text: str, position: int) -> tuple[Callable[[str], str], int]:
    """(what becomes of the token, where it ends); what no rule knows is a token of one character."""
    best: Callable[[str], str] = _same
    end = position
    for pattern, action in _RULES:
        match = pattern.match(text, position)
        if match and match.end() > end:
            best, end = action, match.end()
    return best, max(end, position + 1)


@cache
def _marks_as_letters() -> dict[int, str]:
    """For `re` a mark is no letter: a letter that no rule names stands in its place. Not for those of emoji."""
    points = range(0x300, 0x1F000)
    return {point: "\u00aa" for point in points if unicodedata.category(chr(point)) in ("Mn", "Mc")} | {
        0xFE0F: "\ufe0f"
    }
