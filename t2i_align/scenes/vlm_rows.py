"""Rows of packed questions for training the world's vision-language model.

The picture is read once for its Q questions: they stand in one row behind the picture's tokens,
each sees the picture and itself (a block mask), and all start at the same position,

    [prefix and picture] [question 1 <assistant> answer] ... [question Q <assistant> answer] <pad>

so a row gives each question exactly the states it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.scenes.questions import FIGURE, Question, Seen, ask, ask_open
from t2i_align.scenes.vlm_pictures import Pictures

NOTHING = -100


def questions_for(
    pictures: Pictures, i: int, num: int, rng: np.random.Generator, open_share: float
) -> list[Question]:
    """Q questions about a picture; a model sample's first is VQAScore's on its caption."""
    made: list[Question] = []
    caption = pictures.captions[i]
    if caption is not None:
        answer = "yes" if caption[1] else "no"
        made.append(Question(FIGURE.format(prompt=caption[0]), answer, None, "figure"))
    while len(made) < num:
        free = ask_open(pictures.seen[i], rng) if rng.random() < open_share else None
        made.append(free or ask_any(pictures.seen[i], rng))
    return made


def ask_any(seen: Sequence[Seen], rng: np.random.Generator) -> Question:
    """A question with the answer a coin chose, or with the other one where there is none."""
    wanted = bool(rng.random() < 0.5)
    try:
        return ask(seen, rng, wanted=wanted)
    except ValueError:
        return ask(seen, rng, wanted=not wanted)


@dataclass(frozen=True)
class Rows:
    """Packed question rows, L tokens behind the picture's P.

    Args:
        ids: ``(B, L)`` int64 tokens.
        positions: ``(B, P + L)`` int64.
        mask: ``(B, 1, P + L, P + L)`` bool, True where a token may look.
        labels: ``(B, L)`` int64, the next token where it is an answer or its end, else -100.
        is_answer: ``(B, L)`` bool, where the label is the answer itself.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    is_answer: Tensor


def pack_rows(
    questions: Sequence[Sequence[Question]], tokenizer: Any, prefix: int, assistant: int
) -> Rows:
    """Rows of questions, see the module.

    Args:
        questions: B lists of questions.
        tokenizer: of the model.
        prefix: P, tokens of prefix and picture.
        assistant: id of the token after which an answer stands.
    """
    flat = tokenizer([q.text for row in questions for q in row], add_special_tokens=False).input_ids
    texts, end = iter(flat), tokenizer.eos_token_id
    rows: list[list[tuple[int, int, int, int]]] = []  # token, its segment, its place, its label
    for row in questions:
        tokens = []
        for number, question in enumerate(row):
            answer = tokenizer.convert_tokens_to_ids(question.answer)
            ids = [*next(texts), assistant, answer]
            labels = [NOTHING] * (len(ids) - 2) + [answer, end]
            tokens += [
                (t, number + 1, k, y) for k, (t, y) in enumerate(zip(ids, labels, strict=True))
            ]
        rows.append(tokens)
    length = max(map(len, rows))
    blank = (tokenizer.pad_token_id, 0, 0, NOTHING)
    table = torch.tensor([row + [blank] * (length - len(row)) for row in rows])
    ids, segment, place, labels = table.unbind(-1)
    group = torch.cat([torch.full((len(rows), prefix), -1), segment], 1)
    causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
    seen = (group[:, None, :] == -1) | (group[:, None, :] == group[:, :, None])
    start = torch.arange(prefix).expand(len(rows), -1)
    return Rows(
        ids,
        torch.cat([start, prefix + place], 1),
        (seen & causal)[:, None],
        labels,
        (labels != NOTHING) & (labels != end),
    )
