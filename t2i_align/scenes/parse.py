"""The grammar read backwards: a prompt of the world to GenEval's metadata.

    prompt    = "a photo of " (object | count | object " and " object | object relation object)
    object    = article [colour] class          count = number class "s"

What ``grammar.py`` never says (two objects of one class, one colour twice, a colour on one side
only, a colour in a relation, a wrong article) is outside the grammar, so
``parse(m["prompt"]) == m`` for every prompt m and no other text has metadata.
"""

from __future__ import annotations

import re

from t2i_align.contract import MediaError
from t2i_align.scenes.grammar import COLORS, NUMBERS, RELATIONS, Metadata, article, clause
from t2i_align.scenes.render import CLASSES

START = "a photo of "
OBJECT = re.compile(rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(CLASSES)})")
COUNT = re.compile(rf"({'|'.join(NUMBERS.values())}) ({'|'.join(CLASSES)})s")
JOINT = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")
Noun = tuple[str, str | None]


def parse(prompt: str) -> Metadata:
    """Metadata of a prompt, equal to what the grammar made it from.

    Raises:
        MediaError: the prompt is outside the grammar; the message shows the form.
    """
    found = _read(prompt.removeprefix(START)) if prompt.startswith(START) else None
    if found is None:
        raise MediaError(
            f"'{prompt}' is outside the world's grammar, e.g. 'a photo of a red car' or "
            f"'a photo of a bed left of a car'; classes: {', '.join(CLASSES)}"
        )
    return found | {"prompt": prompt}


def _read(text: str) -> Metadata | None:
    counted = COUNT.fullmatch(text)
    if counted:
        count = next(n for n, word in NUMBERS.items() if word == counted[1])
        include, exclude = [clause(counted[2], count)], [clause(counted[2], count + 1)]
        return {"tag": "counting", "include": include, "exclude": exclude}
    first, *rest = JOINT.split(text)
    a = _noun(first)
    if a is None:
        return None
    if not rest:
        tag = "single_object" if a[1] is None else "colors"
        return {"tag": tag, "include": [clause(a[0], color=a[1])]}
    b = _noun(rest[1]) if len(rest) == 2 else None
    return None if b is None or a[0] == b[0] else _joined(a, rest[0], b)


def _noun(text: str) -> Noun | None:
    match = OBJECT.fullmatch(text)
    if match is None or article(text.partition(" ")[2]) != text:
        return None
    return match[2], match[1]


def _joined(a: Noun, joint: str, b: Noun) -> Metadata | None:
    colored = (a[1] is not None, b[1] is not None)
    if joint != "and":
        include = [clause(b[0]), clause(a[0], position=(joint, 0))]
        return None if any(colored) else {"tag": "position", "include": include}
    if any(colored) and (not all(colored) or a[1] == b[1]):
        return None
    tag = "color_attr" if all(colored) else "two_object"
    return {"tag": tag, "include": [clause(c, color=k) for c, k in (a, b)]}
