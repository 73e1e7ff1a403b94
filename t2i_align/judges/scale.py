r"""Grades and the answers that stand for them.

A judge shows pictures, puts a question, and reads the distribution p of the next token at the
answer slot. That is the first token of the answer, or of what follows ``slot``, a beginning of the
answer which the judge writes itself ("Final Score: "). A level k has a value v_k and ids T_k, the
first tokens of its answers:

    (1)  p_k = sum of p(t) over t in T_k          (2)  s = sum_k v_k p_k / sum_k p_k

With the levels no = 0 and yes = 1, (2) is P(yes) among yes and no; with digits it is the expected
grade. It has no ties, needs one forward pass, and cannot fail to parse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.options import Options


class ScaleOptions(Options):
    """A scale of grades, and how an answer gives one."""

    low: int = Field(default=1, ge=0, description="the lowest grade")
    high: int = Field(default=5, ge=1, description="the highest grade")
    levels: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="answers of the grades, lowest first; null: the digits themselves",
    )
    slot: str = Field(
        default="",
        description="beginning of the answer that is written for the model, up to the grade",
    )
    pattern: str = Field(
        default=r"[Ss]core[\s:*=]*(-?\d+(?:\.\d+)?)",
        description="where a grade stands in a written answer; one group; the last match counts",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="of a written answer")

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"a pattern has one group, the grade; {value!r} has {groups}")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> ScaleOptions:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        num = self.high - self.low + 1
        if self.levels is not None and len(self.levels) != num:
            raise ValueError(f"{num} levels from {self.low} to {self.high}, got {self.levels}")
        return self

    def grades(self) -> dict[str, tuple[str, ...]]:
        """Answers of each grade, lowest first.

        Raises:
            ModelError: digits of more than one token.
        """
        if self.levels is None and self.high > 9:
            raise ModelError(
                f"an expectation over digits reaches 9, not {self.high}",
                "name the grades with levels, or set read: text",
            )
        numbers = range(self.low, self.high + 1)
        words = self.levels or tuple(str(n) for n in numbers)
        return {f"grade {n}": (word,) for n, word in zip(numbers, words, strict=True)}

    def values(self) -> tuple[float, ...]:
        """v_k of Eq. (2)."""
        return tuple(float(n) for n in range(self.low, self.high + 1))

    def parse(self, text: str) -> float | str:
        """The grade in a written answer, or why there is none."""
        found = re.findall(self.pattern, text)
        if not found:
            return f"no grade in the answer {shown(text)}"
        try:
            grade = float(found[-1])
        except ValueError:
            return f"'{found[-1]}' in the answer is no number"
        if not self.low <= grade <= self.high:
            return f"the answer's grade {grade:g} is outside {self.low} to {self.high}"
        return grade


def shown(text: str) -> str:
    """The beginning of an answer, quoted, on one line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def level_logs(log: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """Logs of Eq. (1), ``(B, K)``, from ``(B, vocabulary)``."""
    return torch.stack([log[:, list(i)].logsumexp(-1) for i in ids], -1)


def expectation(logs: Tensor, values: Sequence[float]) -> Tensor:
    """Eq. (2) ``(B,)`` of logs ``(B, K)``; NaN where every level is impossible."""
    return logs.softmax(-1) @ torch.tensor(values, dtype=logs.dtype, device=logs.device)
