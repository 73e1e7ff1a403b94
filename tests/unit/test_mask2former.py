"""Mask2Former under mmdetection's rules: known masks come back, a slow literal reading agrees.

The slow reading is written from the rules in words, with loops over pixels, queries and classes,
and shares nothing with the module.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.errors import ModelError
from t2i_align.evaluate.detectors.base import CLASSES
from t2i_align.evaluate.detectors.mask2former import (
    Mask2Former,
    choose,
    fitted,
    instances,
    mask_scores,
    prepared,
    tight_box,
)
from tests.tiny_detectors import detector_options, mask2former_folder

Grid = list[list[float]]


def bilinear(grid: Grid, height: int, width: int) -> Grid:
    """Enlarge by the textbook: centres of pixels at halves, edges repeated, no antialiasing."""
    rows, columns = len(grid), len(grid[0])

    def place(k: int, new: int, old: int) -> tuple[int, int, float]:
        x = max((k + 0.5) * old / new - 0.5, 0.0)
        low = min(int(x), old - 1)
        return low, min(low + 1, old - 1), x - low

    out = []
    for y in range(height):
        top, bottom, v = place(y, height, rows)
        line = []
        for x in range(width):
            left, right, u = place(x, width, columns)
            above = grid[top][left] * (1 - u) + grid[top][right] * u
            below = grid[bottom][left] * (1 - u) + grid[bottom][right] * u
            line.append(above * (1 - v) + below * v)
        out.append(line)
    return out


def slow(
    class_logits: Grid, mask_logits: list[Grid], padded: Any, resized: Any, original: Any
) -> list[tuple[int, float, tuple[float, ...], list[list[bool]]]]:
    """(class, score, box, mask) of every instance, best 100 of queries x classes."""
    pairs = []
    for q, row in enumerate(class_logits):
        total = sum(math.exp(v) for v in row)
        pairs += [(math.exp(v) / total, q, c) for c, v in enumerate(row[:-1])]
    pairs.sort(reverse=True)
    found = []
    for p, q, c in pairs[:100]:
        large = bilinear(mask_logits[q], *padded)
        cut = [line[: resized[1]] for line in large[: resized[0]]]
        m = bilinear(cut, *original)
        on = [(x, y) for y, line in enumerate(m) for x, v in enumerate(line) if v > 0]
        inside = sum(1 / (1 + math.exp(-m[y][x])) for x, y in on)
        box = (0.0,) * 4
        if on:
            xs, ys = [x for x, _ in on], [y for _, y in on]
            box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        mask = [[v > 0 for v in line] for line in m]
        found.append((c, p * inside / (len(on) + 1e-6), box, mask))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_a_slow_literal_reading(seed: int) -> None:
    """Random logits, odd sizes, fewer pairs than 100 and more."""
    rng = torch.Generator().manual_seed(seed)
    queries, num = (5, 4) if seed % 2 else (9, 14)
    class_logits = 2 * torch.randn(queries, num + 1, generator=rng)
    mask_logits = 3 * torch.randn(queries, 4, 5, generator=rng)
    if seed == 0:
        mask_logits[2] = -1  # an empty mask
    sizes = ((16, 24), (14 + seed % 3, 21), (11, 9 + seed))
    names = [f"c{k}" for k in range(num)]
    found = instances(class_logits, mask_logits, sizes, names)
    expected = slow(class_logits.tolist(), mask_logits.tolist(), *sizes)
    expected = sorted((e for e in expected if e[1] > 0), key=lambda e: -e[1])
    assert len(found) == len(expected) > 10
    for one, (c, score, box, mask) in zip(found, expected, strict=True):
        assert one.cls == names[c] and one.score == pytest.approx(score, rel=1e-5)
        assert one.box == box and one.mask is not None
        assert one.mask.decode().tolist() == mask


def test_known_masks_come_back() -> None:
    """Queries built for three rectangles on whole cells give those rectangles, classes, scores.

    Mask logits of +-40 at 1/4 of the padded input; along an edge the logit crosses 0 half way
    between cells, so edges come back to the pixel. At a corner inside the picture the outermost
    pixel has the weight 0.625^2 < 1/2 and is lost: four of the dog's corners, one of each other's.
    The score is the class probability times the mean of sigmoid(logit) inside, close to 1.
    """
    lost = {"dog": 4, "cat": 1, "car": 1}
    truth = {"dog": (8, 4, 24, 16), "cat": (0, 16, 12, 32), "car": (28, 20, 32, 32)}
    class_logits = torch.full((4, len(CLASSES) + 1), -20.0)
    mask_logits = torch.full((4, 8, 8), -40.0)
    for q, (name, (x1, y1, x2, y2)) in enumerate(truth.items()):
        class_logits[q, CLASSES.index(name)] = math.log(0.9)
        class_logits[q, -1] = math.log(0.1)
        mask_logits[q, y1 // 4 : y2 // 4, x1 // 4 : x2 // 4] = 40.0
    class_logits[3, -1] = 0.0  # nothing there
    found = instances(class_logits, mask_logits, ((32, 32), (32, 32), (32, 32)), floor=0.05)
    assert {d.cls: d.box for d in found} == truth
    for one in found:
        assert one.mask is not None and one.score == pytest.approx(0.9, abs=0.02)
        x1, y1, x2, y2 = map(int, one.box)
        mask = one.mask.decode()
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        assert mask.sum() == (y2 - y1) * (x2 - x1) - lost[one.cls]


def test_one_query_may_be_two_classes_and_none_is_suppressed() -> None:
    class_logits = torch.full((1, len(CLASSES) + 1), -20.0)
    class_logits[0, CLASSES.index("dog")] = math.log(0.6)
    class_logits[0, CLASSES.index("cat")] = math.log(0.4)
    found = instances(
        class_logits, torch.full((1, 2, 2), 30.0), ((4, 4), (4, 4), (4, 4)), floor=0.1
    )
    assert [d.cls for d in found] == ["dog", "cat"] and found[0].box == found[1].box
    assert [d.score for d in found] == pytest.approx([0.6, 0.4], abs=1e-4)


def test_the_best_hundred_of_queries_times_classes() -> None:
    logits = torch.randn(30, 81, generator=torch.Generator().manual_seed(1))
    values, queries, classes = choose(logits)
    p = logits.softmax(-1)[:, :-1]
    assert len(values) == 100 and torch.equal(values, p[queries, classes])
    assert values[-1] >= p.flatten().sort(descending=True).values[100]


def test_an_empty_mask_scores_zero_and_has_no_box() -> None:
    mask, factor = mask_scores(torch.tensor([[[-1.0, 0.0]], [[0.0, 2.0]]]))
    assert mask.tolist() == [[[False, False]], [[False, True]]]
    assert factor[0] == 0 and factor[1].item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-5)
    assert tight_box(mask[0]) == (0, 0, 0, 0) and tight_box(mask[1]) == (1, 0, 2, 1)


@pytest.mark.parametrize(
    ("given", "size", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((480, 640), (800, 1067), (800, 1088)),  # s = 800/480; 640 s = 1066.67
        ((300, 900), (444, 1333), (448, 1344)),  # s = 1333/900; 300 s = 444.33
    ],
)
def test_the_resize_fits_1333_by_800_and_pads_to_32(given: Any, size: Any, padded: Any) -> None:
    assert fitted(*given) == size
    pixels, kept = prepared(torch.zeros(3, *given))
    assert kept == size and pixels.shape == (3, *padded)


def test_padding_is_grey_and_colours_are_normalised() -> None:
    """The picture's part is (value - mean) / std in RGB, the padding (128 - mean) / std."""
    colour = torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1)
    pixels, (height, width) = prepared(colour.expand(3, 300, 900).clone())
    mean = np.array((123.675, 116.28, 103.53))
    std = np.array((58.395, 57.12, 57.375))
    inside = (np.array((200, 100, 50)) - mean) / std
    assert np.allclose(pixels[:, 0, 0], inside, atol=1e-5)
    assert np.allclose(pixels[:, height - 1, width - 1], inside, atol=1e-5)
    assert np.allclose(pixels[:, height, 0], (128 - mean) / std, atol=1e-5)
    assert np.allclose(pixels[:, 0, width], (128 - mean) / std, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask2former_folder(tmp_path_factory.mktemp("m2f"))


def detector(folder: Path, **given: Any) -> Mask2Former:
    return Mask2Former(detector_options(name_or_path=str(folder), **given))


def noise(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_a_real_network_gives_what_the_rules_make_of_its_logits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network of transformers, small, loaded from its folder; two shapes in one call."""
    from transformers import Mask2FormerForUniversalSegmentation

    from t2i_align.evaluate.detectors import mask2former

    monkeypatch.setattr(mask2former, "SHORTER", 96)
    monkeypatch.setattr(mask2former, "LONGER", 160)
    model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    images = [noise(48, 40, 0), noise(30, 60, 1), noise(48, 40, 2)]
    found = detector(folder, floor=0.001).detect(images)
    for image, own in zip(images, found, strict=True):
        pixels, resized = prepared(torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
        with torch.no_grad():
            out = model(pixel_values=pixels[None])
        height, width = pixels.shape[1:]
        sizes = ((height, width), resized, (image.height, image.width))
        alone = instances(
            out.class_queries_logits[0], out.masks_queries_logits[0], sizes, floor=0.001
        )
        assert len(own) == len(alone) > 0
        for a, b in zip(own, alone, strict=True):
            assert a.cls == b.cls and a.score == pytest.approx(b.score, abs=1e-5)
            assert a.mask is not None and a.mask.size == (image.height, image.width)
    swapped = detector(folder, floor=0.001, swap_red_blue=True)
    red, green, blue = images[0].split()
    other = swapped.detect([Image.merge("RGB", (blue, green, red))])[0]
    assert [d.score for d in other] == pytest.approx([d.score for d in found[0]], abs=1e-6)
    assert "exchanged" in swapped.identity()["detector"]


def test_other_classes_are_refused_and_weights_are_hashed(folder: Path, tmp_path: Path) -> None:
    wrong = mask2former_folder(tmp_path / "wrong", num_labels=3)
    with pytest.raises(ModelError, match="knows 3 classes"):
        detector(wrong).detect([noise(8, 8, 0)])
    with pytest.raises(ModelError, match="nothing at"):
        detector(tmp_path / "absent").identity()
    first, second = (detector(f).identity()["detector_sha256"] for f in (folder, wrong))
    assert len(first) == 64 and first != second
