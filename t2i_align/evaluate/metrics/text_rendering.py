r"""Does a picture show the text it should? Four numbers of what was read, r, and the target t.

Both are normalised (Unicode compatibility form, one case, straight marks, no spaces); d is
Levenshtein's edit distance.

    (1)  exact      = 1 if r = t else 0
    (2)  similarity = 1 - d(r, t) / max(|r|, |t|)        one minus the normalised edit distance
    (3)  words      = share of t's words that are read, each counted as often as it is read
    (4)  reward     = 1 if t is inside r, else max(0, 1 - d(r, t) / |t|)

(1) and (2) hold surplus text against a picture, (3) and (4) do not. In (3) punctuation belongs to
its word, and what a recogniser reads without the space ("OPENLATE") counts as both words if they
are neighbours in t. (4) is the reward of Flow-GRPO (arXiv:2505.05470) in its released form
(lower case, spaces removed, nothing else normalised); a picture that prints the text twice or
inside other text keeps all of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from t2i_align.judges.ocr import normalised


@dataclass(frozen=True)
class TextScores:
    """Eq. (1) to (4) of a picture."""

    exact: float
    similarity: float
    words: float
    reward: float


def text_scores(read: str, target: str) -> TextScores:
    """All four.

    Args:
        read: what was recognised, a space between its parts.
        target: what was asked for, not empty.
    """
    return TextScores(
        float(normalised(read) == normalised(target)),
        similarity(read, target),
        word_accuracy(read, target),
        flow_grpo_reward(read, target),
    )


def similarity(read: str, target: str) -> float:
    """Eq. (2), in [0, 1]."""
    from rapidfuzz.distance import Levenshtein

    r, t = normalised(read), normalised(target)
    return 1 - Levenshtein.distance(r, t) / max(len(r), len(t), 1)


def words_of(text: str) -> list[str]:
    """Normalised words."""
    return [word for part in text.split() if (word := normalised(part))]


def word_accuracy(read: str, target: str) -> float:
    """Eq. (3), in [0, 1].

    Raises:
        ValueError: the target has no words.
    """
    wanted = words_of(target)
    if not wanted:
        raise ValueError("the target has no words")
    missing = Counter(wanted)
    glued = []
    for word in words_of(read):
        if missing[word] > 0:
            missing[word] -= 1
        else:
            glued.append(word)
    for word in glued:
        missing -= _inside(word, wanted, missing)
    return 1 - missing.total() / len(wanted)


def _inside(word: str, wanted: list[str], missing: Counter[str]) -> Counter[str]:
    """Words still missing that a read one is made of, neighbours in the target; else none."""
    for start in range(len(wanted)):
        for end in range(start + 2, len(wanted) + 1):
            part = Counter(wanted[start:end])
            if "".join(wanted[start:end]) == word and part <= missing:
                return part
    return Counter()


def flow_grpo_reward(read: str, target: str) -> float:
    """Eq. (4), in [0, 1].

    Args:
        read: what was recognised.
        target: not only spaces.
    """
    from rapidfuzz.distance import Levenshtein

    r, t = (text.replace(" ", "").lower() for text in (read, target))
    if t in r:
        return 1.0
    return 1 - min(Levenshtein.distance(r, t), len(t)) / len(t)
