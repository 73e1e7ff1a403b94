"""Diversity and drift: closed forms, and slow literal readings of the equations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from t2i_align.contract import MediaError
from t2i_align.evaluate.metrics import diversity
from t2i_align.evaluate.metrics.diversity import (
    embedding_diversity,
    perceptual_diversity,
    ssim,
    ssim_distance,
    viewed,
)
from t2i_align.evaluate.metrics.drift import (
    drift,
    hue_and_chroma,
    hue_distance,
    level_distance,
    look,
    sorted_distance,
)

RNG = np.random.default_rng(0)


def noise(height: int = 24, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def flat(*color: int) -> np.ndarray:
    return np.tile(np.array(color, np.uint8), (16, 16, 1))


# --- diversity ---------------------------------------------------------------------------------


def test_equal_pictures_have_no_diversity() -> None:
    """D = 0 for any number of equal embeddings, whatever their length; P = 0 for equal pictures."""
    e = RNG.normal(size=7)
    assert embedding_diversity(np.stack([e, 3 * e, 0.1 * e])) == pytest.approx(0, abs=1e-12)
    assert perceptual_diversity([noise(), noise(), noise()]) == pytest.approx(0, abs=1e-12)


def test_the_extremes_of_embeddings() -> None:
    """Right angles: 1. Opposite pairs: 2 for n = 2; n vectors that sum to 0: n / (n - 1)."""
    assert embedding_diversity(np.eye(5)) == pytest.approx(1)
    assert embedding_diversity(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(2)
    angles = 2 * math.pi * np.arange(3) / 3
    triangle = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert embedding_diversity(triangle) == pytest.approx(1.5)
    sixty = np.array([[1, 0], [0.5, math.sqrt(3) / 2]])
    assert embedding_diversity(sixty) == pytest.approx(0.5)  # 1 - cos 60


def test_the_short_form_is_the_mean_over_pairs() -> None:
    """2,000 random sets against the double sum of Eq. (1), written out."""
    for _ in range(2000):
        n, width = RNG.integers(2, 8), RNG.integers(1, 6)
        e = RNG.normal(size=(n, width))
        total, count = 0.0, 0
        for i in range(n):
            for j in range(i + 1, n):
                dot = sum(a * b for a, b in zip(e[i], e[j], strict=True))
                lengths = math.sqrt(sum(a * a for a in e[i])) * math.sqrt(sum(b * b for b in e[j]))
                total, count = total + 1 - dot / lengths, count + 1
        assert embedding_diversity(e) == pytest.approx(total / count, abs=1e-9)


def test_what_has_no_diversity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two or more embeddings \(n, E\), got \(1, 3\)"):
        embedding_diversity(np.ones((1, 3)))
    with pytest.raises(ValueError, match="has no direction"):
        embedding_diversity(np.array([[1.0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="two or more pictures, got 1"):
        perceptual_diversity([noise()])
    with pytest.raises(ValueError, match="11 x 11 pixels, got 30 x 10"):
        viewed(noise(10))
    with pytest.raises(ValueError, match="one size"):
        ssim(viewed(noise()), viewed(noise(25)))


def literal_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a.astype(float), b.astype(float)))
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            u, v = (p[i - 5 : i + 6, j - 5 : j + 6] for p in (x, y))
            mu, mv = (window * u).sum(), (window * v).sum()
            su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
            suv = (window * (u - mu) * (v - mv)).sum()
            found.append(
                (2 * mu * mv + c1) * (2 * suv + c2) / ((mu**2 + mv**2 + c1) * (su + sv + c2))
            )
    return float(np.mean(found))


def test_ssim_is_the_papers() -> None:
    for seed in range(4):
        a, b = noise(seed=seed), noise(seed=seed + 10)
        mixed = (0.7 * a + 0.3 * b).astype(np.uint8)
        for one, other in itertools.combinations((a, b, mixed), 2):
            assert ssim(viewed(one), viewed(other)) == pytest.approx(
                literal_ssim(one, other), abs=1e-10
            )


def test_ssim_of_flat_pictures_in_closed_form() -> None:
    """No variance: (2 x y + C1) / (x^2 + y^2 + C1) with the grey values x and y."""
    x, y, c1 = 100.0, 200.0, 2.55**2
    expected = (2 * x * y + c1) / (x**2 + y**2 + c1)
    assert ssim(viewed(flat(100, 100, 100)), viewed(flat(200, 200, 200))) == pytest.approx(expected)
    assert ssim_distance(viewed(flat(0, 0, 0)), viewed(flat(255, 255, 255))) == pytest.approx(
        0.5, abs=1e-3
    )


def test_large_pictures_are_seen_at_256_pixels() -> None:
    """A picture enlarged twice, pixel by pixel, is seen as itself."""
    small = noise(256, 260)
    large = small.repeat(2, 0).repeat(2, 1)
    assert np.allclose(viewed(large).grey, viewed(small).grey)
    assert viewed(noise(515, 513)).grey.shape == (257, 256)
    assert viewed(small).mean.shape == (256 - 2 * diversity.RADIUS, 260 - 2 * diversity.RADIUS)


# --- drift -------------------------------------------------------------------------------------


def test_hues_of_known_colors() -> None:
    colors = {(255, 0, 0): 0, (255, 255, 0): 60, (0, 255, 0): 120, (0, 255, 255): 180}
    colors |= {(0, 0, 255): 240, (255, 0, 255): 300, (255, 128, 128): 0, (200, 100, 0): 30}
    for color, degrees in colors.items():
        hue, chroma = hue_and_chroma(flat(*color).astype(float))
        assert np.allclose(hue, degrees) and np.allclose(chroma, max(color) - min(color))
    hue, chroma = hue_and_chroma(flat(9, 9, 9).astype(float))
    assert not hue.any() and not chroma.any()


def test_a_known_hue_shift_is_a_known_drift() -> None:
    """Exchanging channels in a ring turns every hue by 120 degrees and nothing else.

    The mean hue histogram is moved by 120 whatever the picture, if its hues lie in less than 60
    degrees; by 30 from red to orange.
    """
    rng = np.random.default_rng(1)
    green = rng.integers(20, 60, (4, 16, 16))
    channels = np.full_like(green, 250), green, np.full_like(green, 20)
    reds = list(np.stack(channels, -1).astype(np.uint8))
    greens = [np.roll(p, 1, axis=-1) for p in reds]
    prompts = ["a", "a", "b", "b"]
    rows = {
        r["statistic"]: r for r in drift(list(map(look, reds)), list(map(look, greens)), prompts)
    }
    assert rows["hue of pixels, degrees"]["distance"] == pytest.approx(120)
    assert rows["saturation"]["difference"] == pytest.approx(0, abs=1e-12)
    assert rows["saturation"]["distance"] == pytest.approx(0, abs=1e-12)
    orange = hue_distance(look(flat(200, 100, 0)).hues, look(flat(200, 0, 0)).hues)
    assert orange == pytest.approx(30)


def literal_circle(a: np.ndarray, b: np.ndarray) -> float:
    """Least work on a ring of n places: cut the ring at each place in turn, take the best."""
    n, best = len(a), math.inf
    for cut in range(n):
        order = [(cut + k) % n for k in range(n)]
        work, carried = 0.0, 0.0
        for k in order:
            carried += a[k] - b[k]
            work += abs(carried)
        best = min(best, work)
    return best


def test_hue_distance_is_the_least_work_on_the_ring() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        a, b = np.zeros(360), np.zeros(360)
        for side in (a, b):
            places = rng.integers(0, 360, 4)
            np.add.at(side, places, rng.integers(1, 9, 4))
        a, b = a / a.sum(), b / b.sum()
        assert hue_distance(a, b) == pytest.approx(literal_circle(a, b), abs=1e-9)
        shift = int(rng.integers(0, 360))
        one = np.eye(360)[int(rng.integers(360))]
        assert hue_distance(one, np.roll(one, shift)) == pytest.approx(min(shift, 360 - shift))
    assert hue_distance(np.zeros(360), a) is None


def test_brighter_by_l_levels_is_at_l_of_255() -> None:
    for level in (0, 1, 40, 255):
        apart = level_distance(look(flat(0, 0, 0)).levels, look(flat(*[level] * 3)).levels)
        assert apart == pytest.approx(level / 255)
    grey = np.repeat(noise()[..., :1] // 2, 3, -1)
    assert level_distance(look(grey).levels, look(grey + 50).levels) == pytest.approx(50 / 255)
    row = next(
        r for r in drift([look(grey)], [look(grey + 50)], ["a"]) if r["statistic"] == "brightness"
    )
    assert row["difference"] == pytest.approx(50 / 255) and row["low"] is None
    assert row["standardised"] is None  # one picture has no spread


def test_equal_pictures_do_not_drift() -> None:
    looks = [look(noise(seed=k)) for k in range(6)]
    rows = drift(looks, looks, list("aabbcc"))
    assert [r["distance"] for r in rows] == [0.0] * 6
    assert all(r["difference"] == r["low"] == r["high"] == 0 for r in rows[:4])


def test_rows_in_closed_form() -> None:
    """Saturation of flat (255, g, g) is 1 - g/255: base 0, 1/5; model 2/5, 1. Spread 1/10."""
    base = [look(flat(255, g, g)) for g in (255, 204)]
    model = [look(flat(255, g, g)) for g in (153, 0)]
    rows = {r["statistic"]: r for r in drift(base, model, ["a", "b"])}
    found = rows["saturation"]
    assert (found["base"], found["model"]) == (pytest.approx(0.1), pytest.approx(0.7))
    assert found["difference"] == pytest.approx(0.6) == found["distance"]
    assert found["standardised"] == pytest.approx(6)
    assert found["low"] == pytest.approx(0.4) and found["high"] == pytest.approx(0.8)
    assert rows["sharpness"]["distance"] == 0
    # exchanged pictures move in pairs, but the set is the same
    swapped = drift(base, base[::-1], ["a", "b"])[1]
    assert swapped["difference"] == 0 and swapped["distance"] == 0


def test_sorted_distance_is_the_best_matching() -> None:
    """Against all permutations: W_1 of equally many points is the cheapest one-to-one matching."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        a, b = rng.normal(size=5), rng.normal(size=5)
        best = min(np.abs(a - b[list(p)]).mean() for p in itertools.permutations(range(5)))
        assert sorted_distance(a, b) == pytest.approx(best)


def test_unlike_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="1 and 0 pictures of 1 prompts"):
        drift([look(noise())], [], ["a"])
    with pytest.raises(MediaError, match="3 x 3 pixels"):
        look(noise(2))
