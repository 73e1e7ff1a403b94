"""Parsers that find nouns, adjectives and noun phrases in T2I-CompBench's prompts.

    pattern     built in: word lists, endings and the forms that the benchmark's prompts have
    spacy       en_core_web_sm, as the released scripts (which pin 3.5.0); the user installs both

The pattern parser knows the templates ("a X on the left of a Y", "a red X and a green Y") exactly.
In free sentences it guesses: a noun phrase runs from its article to the next preposition,
conjunction, mark or verb, and a verb is a word before an article, or one that looks like a past
tense at the end of a run. Which parser answered, and its hash, are part of every result: numbers
made with two parsers do not compare where prompts are sentences.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from t2i_align.errors import ModelError
from t2i_align.evaluate.answers import file_sha256
from t2i_align.evaluate.metrics.compbench_words import ADJECTIVE, NOUN, OTHER, Parse, Token

CLOSED = {
    "DET": "a an the this that these those its their his her my your our some every each",
    "NUM": "one two three four five six seven eight nine ten",
    "ADP": "on in of to at by with from into onto over under above below beneath behind beside "
    "between near against around through past across along among amongst inside outside upon "
    "within beyond towards toward for off down up out next like without as during before after",
    "CCONJ": "and or but while",
    "AUX": "is are was were be been being has have had could will would does did do may",
    "PRON": "it they he she them him who which what there",
    "ADV": "together apart away not very just as so also ever always up down out still",
    "PART": "while when where if than because",
}
PRONOUNS = ("it", "they", "he", "she", "them", "him")
PHRASES = (
    *("on side of", "next to", "in front of", "hidden by"),
    *(f"on {the}{side}" for the in ("the ", "") for side in ("left", "right", "top", "bottom")),
)
PAST = (
    "lay sat stood swam hung rose fell flew told burst stuck shone ran grew sang slept wore held "
    "threw caught drove rode shot swung hid clung crept bent cut slid spun wound stretched made "
    "gave took lit kept came went met set"
).split()
ADJECTIVES = (
    "red orange yellow green blue purple pink brown black white gray grey golden gold silver beige "
    "tan turquoise maroon violet teal big small tall short long large tiny huge little thin thick "
    "wide narrow round square oval circular rectangular triangular cubic conical spherical oblong "
    "diamond teardrop pentagonal pyramidal cylindrical hexagonal oval flat curved wooden metallic "
    "plastic rubber fabric leather glass fluffy soft rough smooth hard sharp jagged sleek crisp "
    "old new young warm cold cool hot dry wet fresh sweet sour bright dark deep light heavy strong "
    "sturdy calm clear clean fine gentle grand great high low loud quiet rich ripe raw slim tender "
    "vast vivid wild delicate intricate distant ancient modern iridescent plush stale firm tart"
).split()
NOT_ADVERBS = "fly butterfly dragonfly family jelly belly lily bully".split()
ENDINGS = ("y", "ed", "ing", "ous", "ful", "ish", "ic", "al", "ive", "less", "ular", "able", "ant")
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


class Parser(Protocol):
    """Finds parts of speech."""

    def identity(self) -> Mapping[str, Any]:
        """Name, version and hash."""
        ...

    def __call__(self, prompt: str) -> Parse:
        """A prompt's words and noun phrases."""
        ...


class PatternParser:
    """The built-in parser; see the module."""

    def identity(self) -> Mapping[str, Any]:
        """Its name, and the hash of this file."""
        sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return {"parser": "pattern", "parser_sha256": sha256}

    def __call__(self, prompt: str) -> Parse:
        """A prompt's words and noun phrases."""
        words = [(m.group(), m.start()) for m in WORD.finditer(prompt)]
        kinds = _closed(prompt, words)
        tokens, chunks = list(kinds), []
        for start, end in _phrases(words, kinds):
            opened = [k for k in range(start, end) if kinds[k] == OTHER]
            for k in opened[:-1]:
                tokens[k] = ADJECTIVE if _adjective(words[k][0]) else NOUN
            tokens[opened[-1]] = NOUN
            chunks.append((words[start][1], words[end - 1][1] + len(words[end - 1][0])))
        chunks += [(at, at + len(w)) for w, at in words if w.lower() in PRONOUNS]
        made = tuple(Token(w, kind, at) for (w, at), kind in zip(words, tokens, strict=True))
        return Parse(prompt, made, tuple(prompt[a:b] for a, b in sorted(chunks)))


def _closed(prompt: str, words: list[tuple[str, int]]) -> list[str]:
    """Part of speech of words of closed classes, ``X`` of all others."""
    places = [m.span() for p in PHRASES for m in re.finditer(rf"\b{p}\b", prompt.lower())]
    table = {word: kind for kind, text in CLOSED.items() for word in text.split()}
    found = []
    for word, at in words:
        kind = table.get(word.lower(), OTHER)
        if any(a <= at < b for a, b in places):
            kind = "ADP"
        elif not word[0].isalnum():
            kind = "PUNCT"
        elif kind == OTHER and _adverb(word):
            kind = "ADV"
        found.append(kind)
    return found


def _phrases(words: list[tuple[str, int]], kinds: list[str]) -> list[tuple[int, int]]:
    """Spans of words that are noun phrases; verbs among the open words become ``VERB``."""
    found: list[tuple[int, int]] = []
    k = 0
    while k < len(words):
        if kinds[k] != OTHER:
            k += 1
            continue
        start = k - 1 if k and kinds[k - 1] in ("DET", "NUM") else k
        end = _run_end(words, kinds, k)
        stop = _before_verb(words, kinds, k, end, led=start < k)
        if stop > k:
            found.append((start, stop))
        k = end
    return found


def _run_end(words: list[tuple[str, int]], kinds: list[str], start: int) -> int:
    """Where open words end; a comma or "and" between adjectives and more open words joins them."""
    end = start
    while end < len(words):
        if kinds[end] == OTHER:
            end += 1
            continue
        joins = words[end][0] in (",", "and") and end + 1 < len(words) and kinds[end + 1] == OTHER
        plain = [words[k][0] for k in range(start, end) if kinds[k] == OTHER]
        if not joins or not all(_adjective(word) for word in plain):
            break
        end += 1
    return end


def _before_verb(
    words: list[tuple[str, int]], kinds: list[str], start: int, end: int, *, led: bool
) -> int:
    """Where the noun phrase of a run ends: at its verb, which is marked, or with the run."""
    last = words[end - 1][0].lower()
    before_article = end < len(words) and kinds[end] in ("DET", "NUM")
    past = last in PAST or (last.endswith(("ed", "ing")) and len(last) > 4)
    alone = end - start == 1
    if alone and led:
        return end
    # "a red rose and", "a big set of": were it a verb, the phrase would have no noun
    no_place = end == len(words) or kinds[end] != "ADP" or words[end][0] == "of"
    plain = all(_adjective(words[k][0]) for k in range(start, end - 1) if kinds[k] == OTHER)
    headless = no_place and plain and not alone
    if (before_article and not alone) or (past and not headless):
        kinds[end - 1] = "VERB"
        return end - 1
    return end


def _adverb(word: str) -> bool:
    low = word.lower()
    return low.endswith("ly") and low not in (*NOT_ADVERBS, *ADJECTIVES)


def _adjective(word: str) -> bool:
    """Whether a word before a noun looks like an adjective."""
    low = word.lower()
    return low in ADJECTIVES or (len(low) > 4 and low.endswith(ENDINGS))


class SpacyParser:
    """spaCy's own parts of speech and noun phrases."""

    def __init__(self, model: str = "en_core_web_sm") -> None:
        """Load nothing yet.

        Args:
            model: name of an installed pipeline, or a folder of one.
        """
        self.model = model

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, which must tag, and parse for noun phrases.

        Raises:
            ModelError: spaCy or the model is not installed, or does less.
        """
        import importlib

        try:
            found = importlib.import_module("spacy").load(self.model)
        except (ImportError, OSError) as error:
            raise ModelError(
                f"parser 'spacy' needs spaCy and its model {self.model}: {error}",
                f"pip install spacy, python -m spacy download {self.model}; or set parser=pattern",
            ) from error
        if "parser" not in found.pipe_names:
            raise ModelError(
                f"the spaCy pipeline {self.model} finds no noun phrases: it has no parser, only "
                f"{', '.join(found.pipe_names) or 'a tokenizer'}",
                "python -m spacy download en_core_web_sm; or set parser=pattern",
            )
        return found

    def identity(self) -> Mapping[str, Any]:
        """Name and versions; the hash is of every file of the pipeline, with spaCy's version."""
        import importlib

        spacy = importlib.import_module("spacy").__version__
        folder = Path(self.pipeline.path)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
        parts = [f"{p.relative_to(folder)}\0{file_sha256(p)}" for p in files]
        name = f"spacy {Path(self.model).name} ({spacy}, {self.pipeline.meta.get('version')})"
        digest = hashlib.sha256("\n".join([spacy, *parts]).encode()).hexdigest()
        return {"parser": name, "parser_sha256": digest}

    def __call__(self, prompt: str) -> Parse:
        """A prompt's words and noun phrases."""
        document = self.pipeline(prompt)
        tokens = tuple(Token(t.text, t.pos_, t.idx) for t in document)
        return Parse(prompt, tokens, tuple(chunk.text for chunk in document.noun_chunks))


PARSERS: dict[str, Callable[[], Parser]] = {"pattern": PatternParser, "spacy": SpacyParser}
