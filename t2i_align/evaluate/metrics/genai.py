"""GenAI-Bench (Li et al. 2024, arXiv:2406.13743): VQAScore of compositional prompts, by skill.

    (1)  skill = mean VQAScore over the prompts that need it;  all = over the union of the skills

A prompt has several skills; seven of the 1,600 have none and are no part of "all". The released
script takes a prompt's number for its row, which only fits the 1,600 prompts, numbered from 0; the
527 of the VQAScore paper are numbered from 1 and make it fail. Here prompts are found by their id.

People rated six models (three ratings of 1 to 5). How far a judge's numbers follow them, of all
prompts and of those of each skill, is told by ``t2i-align judges bench genai_bench``
(evaluate/human.py): Pearson's r, Kendall's tau-b, accuracy of pairs with calibrated ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.human_layouts import mean_grade

BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal", "advanced")
Skills = Mapping[str, Sequence[int]]


def read_skills(table: Any, ids: Sequence[str], name: str) -> dict[str, list[int]]:
    """The prompts of each skill, by number.

    Args:
        table: what ``genai_skills.json`` holds.
        ids: of the prompts, ``00012``.
        name: of the file, for errors.

    Raises:
        DataError: it is no table of numbers, lacks basic or advanced, or names unknown prompts.
    """
    known = {int(i) for i in ids}
    if not isinstance(table, dict) or not {"basic", "advanced"} <= set(table):
        raise DataError(f"{name} is not GenAI-Bench's table {{skill: [numbers]}}")
    for skill, numbers in table.items():
        odd = [n for n in numbers if n not in known]
        if odd:
            raise DataError(
                f"{name}: skill '{skill}' names prompts {odd[:5]}, which the prompt file lacks",
                "give the two files of one set: 1,600 prompts from 0, or 527 from 1",
            )
    return {skill: list(numbers) for skill, numbers in table.items()}


def skill_means(values: Mapping[int, float], skills: Skills) -> dict[str, float]:
    """Eq. (1), skills in the file's order, then ``all``; a skill without a value is left out.

    Args:
        values: number of a prompt -> its score.
        skills: see :func:`read_skills`.

    Raises:
        DataError: no prompt of any skill has a value.
    """
    means = {}
    for skill, numbers in skills.items():
        found = [values[n] for n in numbers if n in values]
        if found:
            means[skill] = sum(found) / len(found)
    union = sorted({n for numbers in skills.values() for n in numbers if n in values})
    if not union:
        raise DataError("no prompt of any skill has a score")
    return means | {"all": sum(values[n] for n in union) / len(union)}


def human_means(table: Mapping[str, Any], skills: Skills) -> dict[str, dict[str, float]]:
    """People's mean rating of each model, model -> skill -> mean; grades off the scale left out."""
    rated: dict[str, dict[int, float]] = {}
    for name, row in table.items():
        for model, grades in row["models"].items():
            rated.setdefault(model, {})[int(name)] = mean_grade(grades, f"{name}, {model}")
    return {model: skill_means(values, skills) for model, values in rated.items()}
