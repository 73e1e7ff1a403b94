"""Preprocessing of judges against the publishers' own transforms, and bytes against floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import check_slope, pictures, tensor_of
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from t2i_align.contract import MediaError
from t2i_align.judges.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    Preprocess,
)

SHAPES = ((40, 56), (33, 33), (80, 31), (32, 32), (21, 47), (100, 224), (1, 1), (5, 64))
CUBIC = v2.InterpolationMode.BICUBIC


def noisy(sizes: tuple[tuple[int, int], ...] = SHAPES) -> list[Image.Image]:
    """The hardest content for a resize: independent pixels."""
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def floats(mean: Any, std: Any) -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def published(name: str, size: int) -> Any:
    """What the publisher's code does, in torchvision's words."""
    if name == "clip":
        steps = [v2.Resize(size, CUBIC), v2.CenterCrop(size), *floats(CLIP_MEAN, CLIP_STD)]
    elif name == "dino":
        steps = [v2.Resize(round(size * 256 / 224), CUBIC), v2.CenterCrop(size)]
        steps += floats(IMAGENET_MEAN, IMAGENET_STD)
    elif name == "siglip":
        steps = [v2.Resize((size, size), CUBIC), *floats(HALF, HALF)]
    elif name == "vit":
        steps = [v2.Resize((size, size), v2.InterpolationMode.BILINEAR), *floats(HALF, HALF)]
    else:
        assert name == "unit"
        steps = [v2.Resize((size, size), CUBIC), *floats((0.0,) * 3, (1.0,) * 3)]
    return v2.Compose(steps)


@pytest.mark.parametrize("name", ["clip", "dino", "siglip", "vit", "unit"])
@pytest.mark.parametrize("size", [32, 42])
def test_the_published_road_on_bytes(name: str, size: int) -> None:
    ours, theirs = PRESETS[name].sized(size), published(name, size)
    for image in noisy():
        assert (ours.image(image) - theirs(image)).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [31, 32])
def test_transformers_processors(size: int) -> None:
    """Its crop rounds down, so odd margins differ by one pixel from torchvision's."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

    square: Any = {"height": size, "width": size}
    shortest: Any = {"shortest_edge": size}
    clip: Any = CLIPImageProcessorPil(size=shortest, crop_size=square)
    siglip: Any = SiglipImageProcessorPil(size=square, resample=3)
    vit: Any = ViTImageProcessorPil(size=square)
    for image in [*noisy(), *noisy(((size, size + 3),))]:
        for name, theirs in (("clip_transformers", clip), ("siglip", siglip), ("vit", vit)):
            expected = torch.as_tensor(np.array(theirs(image)["pixel_values"][0]))
            found = PRESETS[name].sized(size).image(image)
            assert (found - expected).abs().max() <= 1e-6, (name, image.size)
    odd = noisy(((size, size + 3),))[0]  # 3 to cut: 1 on the left there, 2 in torchvision
    here, there = (PRESETS[n].sized(size).image(odd) for n in ("clip_transformers", "clip"))
    assert torch.equal(here[..., 1:], there[..., :-1]) and not torch.equal(here, there)


def hpsv2_literal(image: Image.Image, size: int) -> Tensor:
    """HPSv2's ResizeMaxSize: floats first, longest side to the size, black bars, then the mean."""
    pixels = tvf.to_dtype(tvf.to_image(image), torch.float32, scale=True)
    height, width = pixels.shape[-2:]
    scale = size / float(max(height, width))
    height, width = (max(1, round(d * scale)) for d in (height, width))
    pixels = tvf.resize(pixels, [height, width], CUBIC, antialias=True)
    down, right = size - height, size - width
    bars = [right // 2, down // 2, right - right // 2, down - down // 2]
    return tvf.normalize(tvf.pad(pixels, bars, fill=[0.0]), list(CLIP_MEAN), list(CLIP_STD))


def test_hpsv2_pads_black_on_floats() -> None:
    """Also where the published code forgets the bars: a picture whose longer side is the size."""
    ours = PRESETS["hpsv2"].sized(32)
    for image in [*noisy(), *noisy(((14, 32), (32, 15)))]:
        assert (ours.image(image) - hpsv2_literal(image, 32)).abs().max() <= 1e-5
    bars = ours.image(Image.new("RGB", (64, 16), "white"))
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert torch.allclose(bars[:, 0, 0], black) and torch.allclose(bars[:, -1, -1], black)
    assert not torch.allclose(bars[:, 16, 16], black)
    assert ours.resized(100, 224) == (14, 32)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_floats_follow_bytes(name: str) -> None:
    """Smooth pictures agree to a few of 255 steps; nothing leaves what bytes can say."""
    ours = PRESETS[name].sized(32)
    step = max(1 / s for s in ours.std) / 255
    for image in pictures():
        tensor = ours.tensor(tensor_of([image]))[0]
        apart = (tensor - ours.image(image)).abs().max()
        assert apart <= (1e-6 if ours.floats else 2 * step)
    high = torch.full((1, 3, 40, 40), 1.0)
    high[..., ::2] = 0
    found = ours.tensor(high)[0] * torch.tensor(ours.std)[:, None, None]
    found = found + torch.tensor(ours.mean)[:, None, None]
    if not ours.floats:
        assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_gradients_are_slopes(name: str) -> None:
    ours = PRESETS[name].sized(24)
    weight = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(4))
    score = lambda x: (ours.tensor(x) * weight).tanh().sum((1, 2, 3))  # noqa: E731
    check_slope(score, tensor_of(pictures(((40, 56), (40, 56)))))


def test_a_batch_is_its_pictures() -> None:
    ours = PRESETS["clip"].sized(24)
    batch = tensor_of(pictures(((40, 56), (40, 56), (40, 56))))
    alone = torch.cat([ours.tensor(batch[i : i + 1]) for i in range(3)])
    assert (ours.tensor(batch) - alone).abs().max() <= 1e-6


def test_sides_after_the_resize() -> None:
    """The longer side is cut to an integer, as torchvision and transformers do."""
    assert PRESETS["clip"].resized(333, 500) == (224, 336)
    assert PRESETS["dino"].resized(256, 256) == (256, 256)
    assert PRESETS["siglip"].resized(10, 999) == (384, 384)
    assert PRESETS["hpsv2"].resized(1, 1000) == (1, 224)


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(MediaError, match="20000 x 2 pixels is too narrow: resized it would be 224"):
        PRESETS["clip"].image(Image.new("RGB", (20000, 2)))
    with pytest.raises(ValueError, match=r"pixels are \(B, 3, h, w\) in \[0, 1\], got \(3, 8, 8\)"):
        Preprocess(8, "squash").tensor(torch.zeros(3, 8, 8))
