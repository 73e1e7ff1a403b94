"""TIFA (Hu et al. 2023, arXiv:2303.11897): questions with choices, and the answer a prompt implies.

    (1)  answer = the free answer if it is one of the choices, else the nearest choice
    (2)  s_q = 1 if that is the right one;  text = mean_q s_q;  TIFA = mean over texts
    (3)  deviation = sample deviation over texts;  by type = mean over all questions of a type

Nearest is the largest cosine between embeddings of free answer and choices
(all-mpnet-base-v2; sentences.py). Rules as in Yushi-Hu/tifa, tifascore/tifa_score.py, commit
8e37050: choices are compared exactly, so ``Yes`` is not ``yes`` and is looked up. In ``variant:
fixed`` case, full stops and spaces at the ends do not matter, and a question that stands twice in a
text counts once (official: each time).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from t2i_align.evaluate.metrics.question_graph import Variant


def chosen(text: str, nearest: str | None, choices: Sequence[str], variant: Variant) -> str | None:
    """Eq. (1); None where the answer is no choice and nobody looked for the nearest.

    Args:
        text: the free answer.
        nearest: the choice found to be nearest, if one was looked for.
        choices: of the question.
        variant: see the module.
    """
    if text in choices:
        return text
    if variant == "fixed":
        plain = [plain_of(c) for c in choices]
        if plain_of(text) in plain:
            return choices[plain.index(plain_of(text))]
    return nearest


def plain_of(text: str) -> str:
    """Lower case, without spaces and full stops at the ends."""
    return text.lower().strip(" \t\r\n.")


def counted(questions: Sequence[Mapping[str, Any]], variant: Variant) -> list[int]:
    """Positions of the questions that count."""
    if variant == "official":
        return list(range(len(questions)))
    first: dict[str, int] = {}
    for k, question in enumerate(questions):
        first.setdefault(question["question"], k)
    return list(first.values())


def deviation(values: Sequence[float]) -> float | None:
    """Sample deviation; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
