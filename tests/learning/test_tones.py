"""Melodies that rise or fall as their prompt says: a preference learned over codec tokens.

World: a melody is eight frames, a random walk over 12 semitones; the prompt says "up" or "down". A
model is fitted by ``sft`` to melodies that ignore their prompts, so a little less than half of its
samples move as asked (some end where they start). Pairs share a prompt; the one whose sound moves
as asked wins, or a coin decides (the control). The sound is real: sinusoids, whose pitch is read
back from their spectrum.

The same on a Llama and on a Dia with two delayed codebooks, pitch and loudness, where the preferred
attribute is in the second one, two columns late. Share of 128 fresh samples that obey (standard
error .04): Llama .44, after ``dpo`` .80, on coin-flip labels .38; Dia .47, .80, .55.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2i_align.generators.dia_lm import DiaLM, DiaLMOptions
from t2i_align.generators.token_lm import TokenLM, TokenLMOptions
from tests import runs
from tests.tiny import llama_folder
from tests.tiny_codes import dia_folder

RATE, FRAME, NOTES, LEVELS = 8000, 800, 12, 12
FRAMES = 8
PROMPTS = ("up", "down")
FREQUENCY = 440 * 2 ** (np.arange(NOTES) / 12)


def sound(notes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Sinusoids of a tenth of a second each: pitch in semitones over 440 Hz, loudness in steps."""
    time = np.arange(FRAME) / RATE
    frames = [
        (1 + level) / LEVELS * np.sin(2 * np.pi * FREQUENCY[note] * time)
        for note, level in zip(notes, levels, strict=True)
    ]
    return np.concatenate(frames)


def heard(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Notes and loudness steps of a sound: the nearest semitone to the spectrum's peak, and RMS."""
    frames = wave.reshape(-1, FRAME)
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(FRAME), 8 * FRAME))
    peak = spectrum.argmax(1) * RATE / (8 * FRAME)
    notes = np.abs(np.log2(peak[:, None] / FREQUENCY)).argmin(1)
    rms = np.sqrt(2 * (frames**2).mean(1))
    return notes, (rms * LEVELS - 1).round().astype(int)


def walk(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random walk over ``size`` steps that ends elsewhere than it starts."""
    while True:
        steps = rng.integers(-2, 3, FRAMES - 1)
        path = np.clip(rng.integers(0, size) + np.concatenate([[0], steps.cumsum()]), 0, size - 1)
        if path[0] != path[-1]:
            return path


def moves_as_asked(codes: np.ndarray, prompt: str) -> bool:
    """Whether the last codebook of ``(T, C)`` codes ends on the asked side of where it starts."""
    notes, levels = codes[:, 0], codes[:, -1] if codes.shape[1] > 1 else np.full(len(codes), 5)
    pitch, loudness = heard(sound(notes, levels))
    path = pitch if codes.shape[1] == 1 else loudness
    return len(path) > 1 and bool(path[-1] > path[0] if prompt == "up" else path[-1] < path[0])


def melody(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Independent walks, ``(T, C)``."""
    return np.stack([walk(rng, NOTES) for _ in range(channels)], 1)


def pairs_file(path: Path, num: int, channels: int, *, shuffled: bool) -> Path:
    """Melodies with opposite movements under one prompt, flattened frame by frame."""
    rng, rows = np.random.default_rng(1), []
    while len(rows) < num:
        prompt = PROMPTS[len(rows) % 2]
        a, b = melody(rng, channels), melody(rng, channels)
        good = moves_as_asked(a, prompt)
        if good == moves_as_asked(b, prompt):
            continue
        first = rng.random() < 0.5 if shuffled else good
        w, l = (a, b) if first else (b, a)  # noqa: E741
        sides = {"chosen": w.flatten().tolist(), "rejected": l.flatten().tolist()}
        rows.append({"id": str(len(rows)), "prompt": prompt, **sides})
    return runs.write_jsonl(path, rows)


def sections(model: dict[str, Any], data: Path, cache: Path, **train: Any) -> dict[str, Any]:
    """A recipe over pairs of codes."""
    return {
        "model": model,
        "objective": {"type": "dpo", "beta": 0.3},
        "data": {"type": "trl", "path": str(data), "media": "codes"},
        "cache": {"dir": str(cache)},
        "train": {
            "report_to": "none",
            "lr_scheduler": "constant",
            "train_batch_size": 32,
            **train,
        },
    }


def obeyed(model: dict[str, Any], num: int = 128) -> float:
    """Share of fresh samples that move as their prompt says."""
    if model["type"] == "dia_lm":
        g: Any = DiaLM(DiaLMOptions(**model))
    else:
        g = TokenLM(TokenLMOptions(**model))
    g.load_module(0, reference=False)
    prompts = list(PROMPTS) * (num // 2)
    inputs = g.prepare_sampling(prompts, num_steps=FRAMES, guidance=1.0)
    media = g.decode(g.rollout(inputs, torch.arange(num), "policy").sample)
    found = [
        moves_as_asked(m.data.reshape(len(m.data), -1).numpy(), prompt)
        for m, prompt in zip(media, prompts, strict=True)
    ]
    return float(np.mean(found))


def test_what_is_played_is_heard() -> None:
    """Every pitch and loudness comes back from its sound exactly."""
    notes, levels = (x.ravel() for x in np.meshgrid(np.arange(NOTES), np.arange(LEVELS)))
    again = heard(sound(notes, levels))
    assert np.array_equal(again[0], notes) and np.array_equal(again[1], levels)
    up = np.stack([np.arange(8), np.arange(8)[::-1]], 1)
    assert moves_as_asked(up[:, :1], "up") and not moves_as_asked(up[:, :1], "down")
    assert moves_as_asked(up, "down")


@pytest.mark.parametrize("family", ["token_lm", "dia_lm"])
def test_melodies_move_as_asked(family: str, tmp_path: Path) -> None:
    channels = 1 if family == "token_lm" else 2
    model: dict[str, Any] = {"type": family, "name_or_path": str(tmp_path / "init")}
    if family == "token_lm":
        llama_folder(tmp_path / "init", NOTES)
        model["num_codes"] = NOTES
    else:
        dia_folder(tmp_path / "init", NOTES, (0, 2), dim=32, scale=1.0)
    neutral = pairs_file(tmp_path / "sft.jsonl", 800, channels, shuffled=True)
    steps = {"learning_rate": 5e-3, "max_train_steps": 120}
    base = sections(model, neutral, tmp_path / "cache", **steps)
    runs.train(tmp_path, "base", base | {"objective": {"type": "sft"}})
    model |= {"name_or_path": str(tmp_path / "base")}
    share = {"base": obeyed(model)}
    for name in ("true", "shuffled"):
        data = pairs_file(tmp_path / f"{name}.jsonl", 600, channels, shuffled=name != "true")
        steps = {"learning_rate": 1e-3, "max_train_steps": 80}
        runs.train(tmp_path, name, sections(model, data, tmp_path / "cache", **steps))
        share[name] = obeyed(model | {"name_or_path": str(tmp_path / name)})
    print(family, share)  # pytest -s; the numbers of docs/methods.md
    assert share["true"] - share["base"] > 0.2, share
    assert abs(share["shuffled"] - share["base"]) < 0.15, share
