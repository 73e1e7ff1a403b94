r"""GenEval's clauses as a number: the verdict, the released reward, and a repaired one.

For an include clause "n objects of class c [of colour k] [in relation to an earlier clause]", m the
detections of c that count and h how many have the colour:

    strict   1 if GenEval's verdict is yes, else 0: at least n, the best n coloured and placed right
    graded   mean of the clauses' terms as yifan123/reward-server computes them (Flow-GRPO trains on
             it): 1 - |n - m|/n, below 0 from m > 2n on; where m = n, 1 - |n - h|/n for the colour
             and, if that is met, 1 for the relation, or the two terms 0 and 1 where it is wrong;
             a single 0 for colour and relation where m is not n; ``exclude`` is not looked at
    fixed    mean in [0, 1] of: min(m, n)/n; h/n among the best n; 1 or 0 for the relation; and for
             an exclude clause "fewer than n of c": max(0, 1 - s/max(n - 1, 1)), s = m - n + 1 > 0

``graded`` pays half for a wrong relation and nothing less for what ``exclude`` forbids elsewhere;
``fixed`` is 1 exactly where ``strict`` is. Which detections count is :func:`geneval.keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import (
    Clause,
    GenEvalOptions,
    evaluate,
    keep,
    read_clauses,
    relations,
)

Reward = Callable[[Sequence[Detection], Mapping[str, Any], GenEvalOptions], float]


def strict(found: Sequence[Detection], metadata: Mapping[str, Any], rules: GenEvalOptions) -> float:
    """GenEval's verdict as 1 or 0."""
    return float(evaluate(found, None, metadata, rules).correct)


def graded(found: Sequence[Detection], metadata: Mapping[str, Any], rules: GenEvalOptions) -> float:
    """The released reward with its quirks; at most 1, below 0 where there are too many."""
    include, _ = read_clauses(metadata)
    kept = keep(found, metadata["tag"], rules)
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in include:
        here = kept.get(clause.cls, [])
        terms.append(1 - abs(clause.count - len(here)) / clause.count)
        met = len(here) == clause.count
        if not met and (clause.color or clause.position):
            terms.append(0.0)
        if met and clause.color:
            right = _coloured(here, clause)
            terms.append(1 - abs(clause.count - right) / clause.count)
            met = right == clause.count
        if met and clause.position:
            if groups[clause.position[1]] is None:
                met, more = False, [0.0]
            else:
                met = _placed(here, clause, groups, rules)
                more = [1.0] if met else [0.0, 1.0]
            terms += more
        groups.append(here if met else None)
    return sum(terms) / len(terms) if terms else 0.0


def fixed(found: Sequence[Detection], metadata: Mapping[str, Any], rules: GenEvalOptions) -> float:
    """Mean over all clauses in [0, 1]; 1 exactly where :func:`strict` is."""
    include, exclude = read_clauses(metadata)
    kept = keep(found, metadata["tag"], rules)
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in include:
        best = kept.get(clause.cls, [])[: clause.count]
        own = [len(best) / clause.count]
        if clause.color:
            own.append(_coloured(best, clause) / clause.count)
        if clause.position:
            placed = min(own) == 1 and _placed(best, clause, groups, rules)
            own.append(float(placed))
        terms += own
        groups.append(best if min(own) == 1 else None)
    for clause in exclude:
        surplus = max(0, len(kept.get(clause.cls, [])) - clause.count + 1)
        terms.append(max(0.0, 1 - surplus / max(clause.count - 1, 1)))
    return sum(terms) / len(terms) if terms else 1.0


def _coloured(found: Sequence[Detection], clause: Clause) -> int:
    """How many have the clause's colour.

    Raises:
        DataError: the detector gave none.
    """
    for detection in found:
        if detection.color is None:
            raise DataError(f"the detector gave no colour for the {detection.cls} it found")
    return sum(d.color == clause.color for d in found)


def _placed(
    found: Sequence[Detection],
    clause: Clause,
    groups: Sequence[Sequence[Detection] | None],
    rules: GenEvalOptions,
) -> bool:
    """Whether every object stands in the relation to every member of the earlier clause."""
    assert clause.position is not None
    relation, index = clause.position
    targets = groups[index]
    t = rules.position_threshold
    return targets is not None and all(
        relation in relations(a.box, b.box, t) for a in found for b in targets
    )


OUTPUTS: dict[str, Reward] = {"strict": strict, "graded": graded, "fixed": fixed}
