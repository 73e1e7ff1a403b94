"""What the exact judge reads: renders, renders made worse, and pictures of nothing.

``python -m tests.judge_numbers`` prints the table of ``docs/scenes.md``; the tests hold its bounds.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.generators.diffusers_folder import local_path
from t2i_align.scenes import grammar
from t2i_align.scenes.detect import detect
from t2i_align.scenes.render import render
from tests.scenes_controls import CONTROLS, canvas

Filter = Callable[[np.ndarray], np.ndarray]


def scenes(num: int, seed: int) -> list[tuple[grammar.Metadata, grammar.Scene, np.ndarray]]:
    """Prompts with a scene and its picture."""
    rng = np.random.default_rng(seed)
    items = grammar.sample_prompts(num, seed, held_out=False)
    drawn = [(m, grammar.scene_for(m, rng)) for m in items]
    return [(m, s, render(s, rng)) for m, s in drawn]


def jpeg(image: np.ndarray) -> np.ndarray:
    """A JPEG file of quality 50, colour at half the resolution."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=50)
    return np.asarray(Image.open(stream))


def blur(image: np.ndarray) -> np.ndarray:
    """A Gaussian of .7 pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


@cache
def autoencoder() -> Any:
    """That of the bundled models."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(local_path("bundled/scenes_sdxl") / "vae").eval()


@torch.no_grad()
def round_trip(image: np.ndarray) -> np.ndarray:
    """Encoded and decoded by the bundled autoencoder."""
    vae = autoencoder()
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 0)
    return ((made + 1) * 127.5).clamp(0, 255).round().byte().numpy()


CHANGES: dict[str, tuple[Filter, float]] = {  # and the share that has to be read fully right
    "plain": (lambda x: x, 0.995),
    "JPEG q50, 4:2:0": (jpeg, 0.95),
    "blur": (blur, 0.95),
    "autoencoder": (round_trip, 0.95),
}


def read_fully(change: Filter, num: int) -> float:
    """Share of pictures of which everything is found with class and colour, and nothing more."""
    right = 0
    for item, scene, image in scenes(num, 2):
        found = detect(change(image))
        got = Counter((p.detection.cls, p.detection.color) for p in found if p.accepted)
        verdict = evaluate([p.detection for p in found], None, item)
        right += got == Counter((t.cls, t.color) for t in scene.things) and verdict.correct
    return right / num


def taken_for(name: str, num: int) -> tuple[float, float]:
    """Share of control pictures with an accepted object, and with one of the commonest class."""
    rng = np.random.default_rng(11)
    accepted, classes = 0, Counter[str]()
    for _ in range(num):
        hits = [p for p in detect(canvas(CONTROLS[name](rng), rng)) if p.accepted]
        accepted += bool(hits)
        classes.update({p.detection.cls for p in hits})
    return accepted / num, max(classes.values(), default=0) / num


def main(num: int = 1000) -> None:
    """Print the table."""
    table = Table("pictures", "number", "fully right", "accepted", "as one class", box=None)
    for name, (change, _) in CHANGES.items():
        table.add_row(f"renders, {name}", str(num), f"{read_fully(change, num):.3f}")
    for name in CONTROLS:
        share, most = taken_for(name, num)
        table.add_row(name, str(num), "", f"{share:.3f}", f"{most:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
