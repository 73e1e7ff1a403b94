"""T2I-CompBench's other scores: attribute questions, the three in one, marks in words.

    attributes    answers p_i of "red apple?", "green train?", ... each rounded to 4 decimals
                  (1)  score = prod_i p_i over the first eight; 1 without a question; again rounded
    complex       b = (1), s = the spatial score, c = cosine of picture and prompt
                  (2)  in complex_val_spatial.txt: (b + s) / 2;  else in complex_val_action.txt:
                       (b + c) / 2;  else (b + s + c) / 3
    marks         a model writes {"score": m, "explanation": ...} for each noun phrase (attributes;
                  m of 1 to 4) or once for the prompt (m of 1 to 5)
                  (3)  score = 100 prod_i share(m_i),  share: .1 .2 .75 1 or .2 .4 .6 .8 1

c lives near 0.3 and b, s up to 1, so (2) compares only with itself. ``variant: fixed`` leaves the
rounding out, gives 0 to attribute prompts without a question, and a picture without one readable
mark has no score (``official``: unreadable marks are skipped, so such a picture gets the full 100).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence

from t2i_align.evaluate.metrics.compbench import Variant

MAX_QUESTIONS = 8
PLACES = ("top", "the side", "the left", "the right")
ATTRIBUTE_SHARES = {1: 0.1, 2: 0.2, 3: 0.75, 4: 1.0}
SHARES = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 1.0}


def questions(chunks: Sequence[str]) -> list[str]:
    """A question a noun phrase, phrases that only name a place left out."""
    kept = [chunk for chunk in chunks if chunk not in PLACES]
    return [f"{chunk}?" for chunk in kept[:MAX_QUESTIONS]]


def asked(question: str) -> str:
    """A question as the model gets it: lower case, some punctuation gone."""
    return re.sub(r"[.!\"()*#:;~]", "", question.lower()).rstrip(" ")


def attribute_score(yes: Sequence[float], variant: Variant = "official") -> float:
    """Eq. (1) of the probabilities of "yes"."""
    if variant == "fixed":
        return math.prod(yes) if yes else 0.0
    return round(math.prod(round(p, 4) for p in yes), 4)


def key(prompt: str) -> str:
    """What the released script knows a complex prompt by."""
    return prompt.strip().split(".")[0].lower()


def complex_part(prompt: str, spatial: Collection[str], action: Collection[str]) -> str:
    """Which case of Eq. (2) a prompt is: ``spatial``, ``action`` or ``both``.

    Args:
        prompt: text.
        spatial: keys of the prompts of complex_val_spatial.txt.
        action: keys of those of complex_val_action.txt.
    """
    name = key(prompt)
    return "spatial" if name in spatial else "action" if name in action else "both"


def complex_score(part: str, attributes: float, placed: float, cosine: float) -> float:
    """Eq. (2) of b, s and c, for a case of :func:`complex_part`."""
    if part == "spatial":
        return (attributes + placed) / 2
    if part == "action":
        return (attributes + cosine) / 2
    return (attributes + placed + cosine) / 3


def read_mark(text: str, top: int, variant: Variant = "official") -> int | None:
    """The mark in a written answer, None where it cannot be read.

    ``official`` wants one JSON object and closes one that was cut off inside its last text;
    ``fixed`` also takes an object inside other text, or a bare ``"score": 3``.

    Args:
        text: what was written.
        top: the highest mark.
        variant: see the module.
    """
    if not text:
        return None
    whole = text if text.endswith("}") else text + '"\n}'
    try:
        mark = json.loads(whole.replace("\n", ""))["score"]
    except (ValueError, KeyError, TypeError):
        mark = None
    if mark is None and variant == "fixed":
        found = re.findall(r"[\"']?score[\"']?\s*[:=]\s*[\"']?(\d+)", text, re.IGNORECASE)
        mark = found[-1] if found else None
    name = str(mark)
    return int(name) if re.fullmatch(r"[1-9]", name) and int(name) <= top else None


def marks_score(
    texts: Sequence[str], *, attributes: bool, variant: Variant = "official"
) -> float | None:
    """Eq. (3), None where ``fixed`` cannot read a single mark.

    Args:
        texts: written answers.
        attributes: marks of 1 to 4 for noun phrases; else of 1 to 5 for the prompt.
        variant: see the module.
    """
    shares = ATTRIBUTE_SHARES if attributes else SHARES
    marks = [read_mark(text, len(shares), variant) for text in texts]
    known = [m for m in marks if m is not None]
    if not known and variant == "fixed":
        return None
    return 100 * math.prod(shares[m] for m in known)
