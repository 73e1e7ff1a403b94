"""A detector must find again what it once found in one picture, before it may score any.

The known failures of detectors are silent: a wrong config, an operator compiled for another GPU,
other weights; scores only get lower. So what a detector finds in a test picture is recorded once by
weights, with the objects that a person says are in it, and every run compares.

    record   the picture is shown to the detector; every object that is vouched for must be found
             with a score above 0.3, else nothing is recorded. Without a picture of one's own and
             without objects the drawn one is used, and the record only says "as on that machine".
    require  a run refuses to score without a record of its weights, or where boxes or scores of the
             record's best detections are not found again.

Records lie beside the card (``eval/geneval/self_tests``) or in
``$T2I_ALIGN_BENCHMARKS/self_tests``, one file a detector and weights.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.errors import DataError, ModelError
from t2i_align.evaluate.answers import write_whole
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors.base import CLASSES, Detector
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import home

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
SIDE = 512
KEPT = 20  # best detections of a record
THRESHOLD = 0.3  # what is vouched for must score more
SCORE_LEEWAY = 0.03
BOX_LEEWAY = 0.02  # of the longer side


def drawn() -> Image:
    """The picture that is used when none is given: four objects of the embedded world, enlarged."""
    import numpy as np
    from PIL import Image as PILImage

    from t2i_align.scenes.render import Scene, Thing, render

    things = (
        Thing("car", "red", (16.0, 16.0), 26),
        Thing("umbrella", "blue", (48.0, 16.0), 26),
        Thing("bed", "green", (16.0, 48.0), 26),
        Thing("bottle", "brown", (48.0, 48.0), 26),
    )
    small = PILImage.fromarray(render(Scene(things), np.random.default_rng(0)))
    return small.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)


def read_vouched(text: str) -> dict[str, int]:
    """``dog:2,car:1`` as counts by class.

    Raises:
        DataError: a class is none of GenEval's, or a count no whole number >= 1.
    """
    found: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, count = part.partition(":")
        if name not in CLASSES or not count.isdigit() or int(count) < 1:
            raise DataError(f"self_test_objects: '{part}' is not CLASS:COUNT of GenEval's classes")
        found[name] = int(count)
    return found


def png_of(image: Image) -> bytes:
    """The picture as a PNG file, for the record and its hash."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def places(identity: Mapping[str, Any]) -> list[Path]:
    """Where the record of a detector may lie, the writable place last."""
    from t2i_align.catalog import find_root

    name = hashlib.sha256(str(identity["detector"]).encode()).hexdigest()[:8]
    file = f"{name}-{str(identity['detector_sha256'])[:16]}.json"
    return [find_root() / "eval" / "geneval" / "self_tests" / file, home() / "self_tests" / file]


def record(detector: Detector, picture: Path | None, vouched: Mapping[str, int]) -> Path:
    """Record what a detector finds.

    Args:
        detector: to be trusted from now on.
        picture: photograph of known objects; None: the drawn one.
        vouched: how many of which objects are in it.

    Raises:
        ModelError: it does not find what is vouched for, or nothing at all.
        DataError: objects are vouched for, but no picture is given.
    """
    if vouched and picture is None:
        raise DataError("self_test_objects needs the picture they are in", "set self_test_picture")
    image = drawn() if picture is None else read_picture(picture)
    found = detector.detect([image])[0][:KEPT]
    seen = Counter(d.cls for d in found if d.score > THRESHOLD)
    lacking = [f"{n} {c} (found {seen[c]})" for c, n in vouched.items() if seen[c] < n]
    if lacking or not found:
        raise ModelError(
            f"the detector does not find {', '.join(lacking) or 'anything'} in the test picture",
            "weights, config or a compiled operator are wrong; nothing was recorded",
        )
    identity = detector.identity()
    png = png_of(image)
    known = {
        "format": FORMAT,
        **identity,
        "vouched": dict(vouched),
        "machine": platform.platform(),
        "picture_sha256": hashlib.sha256(png).hexdigest(),
        "detections": [{**d.to_dict(), "mask": None} for d in found],
        "picture": base64.b64encode(png).decode(),
    }
    target = places(identity)[-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, [json.dumps(known, indent=1)])
    return target


def check(detector: Detector) -> dict[str, Any]:
    """Compare a detector with its record.

    Returns:
        ``{self_test, self_test_sha256}``: ``verified`` where objects were vouched for, else
        ``reproduced``; ``exact`` for a detector without weights.

    Raises:
        ModelError: there is no record, or the detector finds something else now.
    """
    identity = detector.identity()
    if identity["detector_sha256"] is None:
        return {"self_test": "exact", "self_test_sha256": None}
    file = next((p for p in places(identity) if p.is_file()), None)
    if file is None:
        raise ModelError(
            f"no self-test of '{identity['detector']}' with these weights is recorded",
            "record one on a machine you trust: --set self_test=record --set "
            "self_test_picture=PHOTO --set self_test_objects=dog:1,car:2",
        )
    known = _read(file)
    png = base64.b64decode(known["picture"])
    from PIL import Image as PILImage

    image = PILImage.open(io.BytesIO(png)).convert("RGB")
    expected = [_detection(row) for row in known["detections"]]
    problems = differences(expected, detector.detect([image])[0], max(image.size))
    if problems:
        raise ModelError(
            f"the detector fails its self-test ({file}): {'; '.join(problems[:3])}",
            "weights, config or a compiled operator differ from when it was recorded; its numbers "
            "would not compare",
        )
    status = "verified" if known["vouched"] else "reproduced"
    return {"self_test": status, "self_test_sha256": known["picture_sha256"]}


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
        if known["format"] == FORMAT:
            return known
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the self-test {file} cannot be read: {error}", "record anew") from error
    raise ModelError(f"the self-test {file} has format {known['format']!r}", "record anew")


def _detection(row: Mapping[str, Any]) -> Detection:
    return Detection.from_dict({k: v for k, v in row.items() if v is not None})


def differences(expected: Sequence[Detection], found: Sequence[Detection], side: int) -> list[str]:
    """Expected detections that are not found again.

    Args:
        expected: of the record.
        found: now.
        side: longer side of the picture; boxes may move by :data:`BOX_LEEWAY` of it, scores by
            :data:`SCORE_LEEWAY`.
    """
    rest = list(found)
    problems = []
    for wanted in expected:
        near = [d for d in rest if d.cls == wanted.cls and _near(d, wanted, side)]
        if near:
            rest.remove(min(near, key=lambda d: abs(d.score - wanted.score)))
            continue
        same = [
            f"{d.score:.2f} at {[round(x) for x in d.box]}" for d in rest if d.cls == wanted.cls
        ]
        place = [round(x) for x in wanted.box]
        now = ", ".join(same[:2]) or "nothing of that class"
        problems.append(f"expected {wanted.cls} {wanted.score:.2f} at {place}, found {now}")
    return problems


def _near(a: Detection, b: Detection, side: int) -> bool:
    moved = max(abs(x - y) for x, y in zip(a.box, b.box, strict=True))
    return abs(a.score - b.score) <= SCORE_LEEWAY and moved <= BOX_LEEWAY * side
