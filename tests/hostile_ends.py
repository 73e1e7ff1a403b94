"""What comes of reading a file, told in two words, and the counts of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from t2i_align.contract import MediaError
from t2i_align.data.images import image_size, open_image
from t2i_align.errors import UserError

REFUSED, READ = "refused", "read"
SO_FAR: Counter[str] = Counter()  # of this process's tests


def end_of(action: Callable[[], Any]) -> str:
    """What came of reading a file; an exception that is no answer to a user is told apart."""
    try:
        action()
    except (UserError, MediaError) as error:
        return REFUSED if str(error).strip() else "refused without a message"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return READ


def count(ends: Iterable[str]) -> None:
    """Print how many files came to what end, here and in all tests so far."""
    here = Counter(ends)
    SO_FAR.update(here)
    both = (", ".join(f"{n} {end}" for end, n in c.most_common()) for c in (here, SO_FAR))
    print("hostile files: {}; so far {}".format(*both))


def settle(ends: dict[str, str], must: Callable[[str], bool] = lambda _: False) -> None:
    """Print the counts; fail on every end that is none, and on what had to be refused."""
    count(e if e in (REFUSED, READ) else "defect" for e in ends.values())
    odd = {k: v for k, v in ends.items() if v not in (REFUSED, READ) or (must(k) and v == READ)}
    assert not odd, f"{len(odd)} defects\n" + "\n".join(f"{k}: {v}" for k, v in odd.items())


def look(data: bytes) -> None:
    """Everything that is done with a picture's bytes."""
    from t2i_align.data.video import load_clip

    image = open_image(data)
    assert image.mode == "RGB" and image.width * image.height > 0
    assert image_size(data) == (image.height, image.width)
    load_clip(data, 1, 8, "center", "k", False)
