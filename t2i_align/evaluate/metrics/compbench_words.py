"""Which words of a prompt T2I-CompBench's scores look for, given its parts of speech.

The released scripts ask spaCy; what they do with its answer is here, so that any parser will do
(benchmarks/compbench_parsers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOUN, PROPER, ADJECTIVE, OTHER = "NOUN", "PROPN", "ADJ", "X"
COMPLEX_PHRASES = (
    "on top of",
    "on bottom of",
    "on the left",
    "on the right",
    "next to",
    "on side of",
    "near",
)


@dataclass(frozen=True)
class Token:
    """A word or a mark.

    Args:
        text: as written.
        kind: ``NOUN, PROPN, ADJ`` or another part of speech, in universal tags.
        start: of its first character in the prompt.
    """

    text: str
    kind: str
    start: int


@dataclass(frozen=True)
class Parse:
    """What a parser says of a prompt.

    Args:
        prompt: text.
        tokens: in order.
        chunks: noun phrases in order, as written.
    """

    prompt: str
    tokens: tuple[Token, ...]
    chunks: tuple[str, ...]


def two_objects(parse: Parse) -> list[str]:
    """The first and the last noun; none without a noun, twice the same with one."""
    nouns = [token.text for token in parse.tokens if token.kind == NOUN]
    return [nouns[0], nouns[-1]] if nouns else []


def complex_objects(parse: Parse) -> list[str]:
    """The nouns beside each phrase of place, before and behind it; two words or none.

    The nearest noun or name before the phrase's first occurrence, the first noun behind it, the
    first name if there is none.
    """
    found: list[str] = []
    for phrase in COMPLEX_PHRASES:
        at = parse.prompt.find(phrase)
        if at < 0:
            continue
        before = [t for t in parse.tokens if t.start < at]
        behind = [t for t in parse.tokens if t.start >= at + len(phrase)]
        found += _first(before[::-1], (NOUN, PROPER))
        found += _first(behind, (NOUN,)) or _first(behind, (PROPER,))
    return found if len(found) == 2 else []


def _first(tokens: Sequence[Token], kinds: Sequence[str]) -> list[str]:
    return next(([t.text] for t in tokens if t.kind in kinds), [])


def without_adjectives(parse: Parse) -> str:
    """The words and marks of a prompt that are no adjectives, a space between any two."""
    return " ".join(token.text for token in parse.tokens if token.kind != ADJECTIVE)
