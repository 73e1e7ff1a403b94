"""Training of the world's dual encoder: what it is shown, its loss, and continuing a run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from t2i_align.errors import InterruptedRun, OutputError
from t2i_align.scenes import clip_pool, grammar
from t2i_align.scenes.clip_judge import ClipPlan, Trainer, train_clip_judge
from t2i_align.scenes.clip_model import LENGTH, SPECIAL, WEIGHTS, ranking, word_tokenizer
from t2i_align.scenes.detect import detect
from t2i_align.scenes.pairs import encoded
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import Scene, Thing, render
from t2i_align.scenes.score import graded_score

QUIET = Console(quiet=True, file=io.StringIO())
PLAN = ClipPlan(renders=6, steps=3, batch=4)


@pytest.fixture(scope="module")
def pool() -> clip_pool.Pool:
    return clip_pool.render_chunk((12, 0, 0))


def test_a_chunk_is_a_function_of_its_numbers(pool: clip_pool.Pool) -> None:
    again, other = (clip_pool.render_chunk((3, 0, i)) for i in (1, 2))
    assert np.array_equal(clip_pool.render_chunk((3, 0, 1)).images, again.images)
    assert not np.array_equal(again.images, other.images)
    assert len(clip_pool.joined([again, other])) == 6 and len(pool.take(slice(0, 5))) == 5


def test_answers_are_the_exact_judges(pool: clip_pool.Pool) -> None:
    """y = (verdict + graded) / 2: renders fulfil their own prompt, twins mostly do not."""
    vocabulary = clip_pool.vocabulary()
    for images, texts, targets in zip(pool.images, pool.texts, pool.targets, strict=True):
        for image, row in zip(images, targets, strict=True):
            graded = [graded_score(detect(image), vocabulary[t]) for t in texts]
            extra = 2 * row - graded
            assert np.allclose(extra, extra.round(), atol=1e-5)  # the verdict, 0 or 1
    own = pool.targets[:, :, 0]
    assert (own[:, 0] > 0.5).all() and own[:, 1].mean() < own[:, 0].mean() - 0.2
    assert (pool.targets[:, 0, 1:] < own[:, :1] + 1e-6).mean() > 0.9


def test_prompts_of_a_group_are_training_prompts_and_near() -> None:
    training = {m["prompt"] for side in grammar.prompts(held_out=False).values() for m in side}
    assert {m["prompt"] for m in clip_pool.vocabulary()} == training
    rng = np.random.default_rng(0)
    item = parse("a photo of a red car and a green bed")
    own = clip_pool.key_of(item)
    for _ in range(20):
        texts = clip_pool.texts_for(item, rng)
        assert len(set(texts)) == clip_pool.NUM_TEXTS
        assert clip_pool.vocabulary()[texts[0]]["prompt"] == item["prompt"]
        for place in texts[1:-1]:
            tag, nouns, _ = clip_pool.key_of(clip_pool.vocabulary()[place])
            exchanged = sorted(n[0] for n in nouns) == ["bed", "car"]
            one = sum(a != b for a, b in zip(nouns, own[1], strict=False)) == 1
            assert exchanged or one or tag == "two_object"


def test_cells_are_where_things_are() -> None:
    things = (Thing("car", "red", (14.0, 12.0), 24), Thing("tie", "blue", (48.0, 50.0), 24))
    classes, colors = clip_pool.cells(detect(render(Scene(things), np.random.default_rng(0))))
    seen = {
        (int(y), int(x)): (clip_pool.CLASSES[classes[y, x]], clip_pool.COLORS[colors[y, x]])
        for y, x in np.argwhere(classes != clip_pool.NONE)
    }
    assert seen == {(0, 0): ("car", "red"), (3, 3): ("tie", "blue")} or seen == {
        (0, 0): ("car", "red"),
        (3, 2): ("tie", "blue"),
    }


def test_sample_groups_leave_held_out_prompts_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for held in (False, True):
        item = next(iter(grammar.prompts(held_out=held)["position"]))
        from PIL import Image

        picture = encoded(Image.fromarray(render(grammar.scene_for(item, rng), rng)))
        rows.append({"caption": item["prompt"], "jpg_0": picture, "jpg_1": picture})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    kept = clip_pool.sample_rows([tmp_path / "p.parquet"])
    assert [r["caption"] for r in kept] == [rows[0]["caption"]]
    found = next(iter(clip_pool.sample_pools(kept, 0)))
    assert found.targets[0, 0].tolist() == found.targets[0, 1].tolist()  # the same picture twice
    assert found.targets[0, 0, 0] > 0.5


def test_ranking_in_closed_form() -> None:
    """Answers .9, .5, .48: two ordered pairs and one tie; -log sigmoid(d) = log(1 + e^-d)."""
    s = torch.tensor([[1.0, 0.0, -1.0]])
    y = torch.tensor([[0.9, 0.5, 0.48]])
    expected = (np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-2.0))) / 2
    assert float(ranking(s, y)) == pytest.approx(expected)
    assert float(ranking(s, torch.zeros(1, 3))) == 0
    better, worse = (float(ranking(sign * y, y)) for sign in (1, -1))
    assert better < np.log(2) < worse


def test_words_are_single_fixed_tokens() -> None:
    tok = word_tokenizer()
    assert tok.convert_ids_to_tokens(list(range(4))) == list(SPECIAL)
    ids = tok("a photo of a Red car").input_ids
    assert ids[0] == 2 and ids[-1] == 3 and len(ids) == 8 and 0 not in ids
    assert tok("a photo of a giraffe").input_ids.count(0) == 1
    longest = max(len(tok(m["prompt"]).input_ids) for m in clip_pool.vocabulary())
    assert longest == LENGTH


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS)


def interrupted(trainer: Trainer) -> float:
    raise KeyboardInterrupt


def test_a_continued_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every step and continued: the same weights, bit for bit; no work is left."""
    train_clip_judge(tmp_path / "a", PLAN, console=QUIET, workers=1)
    for step in (1, 2):
        with pytest.raises(InterruptedRun, match=f"step {step} of 3 is saved"):
            train_clip_judge(tmp_path / "b", PLAN, console=QUIET, workers=1, minutes=0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(InterruptedRun, match="step 2 of 3 is saved"):
            train_clip_judge(tmp_path / "b", PLAN, console=QUIET, workers=1)
    with pytest.raises(OutputError, match=r"holds an unfinished run of another plan(?s:.*)repeat"):
        train_clip_judge(tmp_path / "b", ClipPlan(renders=7), console=QUIET, workers=1)
    result = train_clip_judge(tmp_path / "b", PLAN, console=QUIET, workers=1, minutes=0)
    assert result["steps"] == 3 and not (tmp_path / "b" / "work").exists()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {WEIGHTS, "open_clip_config.json", "tokenizer.json", "tokenizer_config.json"}
