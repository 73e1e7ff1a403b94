"""Padded and given frames of clips: what is scored, what is drawn, what a run makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import write_recipe

from t2i_align.contract import DrawSpec, Media, MediaError, Sample, Seeds
from t2i_align.errors import ModelError, RecipeError
from t2i_align.generators.clip_masks import REAL_FRAMES, SCORED, scored
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import layout_of
from t2i_align.process.elbo import elbo_score
from t2i_align.recipe import load_recipe
from tests import runs, tiny_video
from tests.stock_pipelines import PROMPTS, SEEDS
from tests.tiny import pipeline_folder
from tests.tiny_video import moving, mp4

TEXT = {"wan": 32, "ltx": 32, "cogvideox": 24}
CLIP = {"resolution": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by family, built once."""

    @cache
    def build(name: str) -> Path:
        return vars(tiny_video)[name](tmp_path_factory.mktemp(name))

    return build


def made(where: Path, **changes: Any) -> DiffusersGenerator:
    """The policy loaded."""
    text = {"max_sequence_length": TEXT.get(where.name.rstrip("0123456789"), 32)}
    options = {"name_or_path": str(where), **CLIP, **text, **changes}
    g = DiffusersGenerator(DiffusersOptions.model_validate(options))
    g.load_module(0, reference=False)
    return g


def encoded(g: DiffusersGenerator, num_frames: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Latents and facts of a clip's file."""
    data = mp4(moving(3, num_frames, (32, 32)))
    (found,) = g.encode_media([g.load_media(Media("video", data, {"key": "k"}), "")])
    return dict(found.state), found.meta


def sample(g: DiffusersGenerator, *num_frames: int) -> Sample:
    """A batch of clips of so many frames."""
    states, metas = zip(*(encoded(g, n) for n in num_frames), strict=True)
    return g.assemble(states, g.encode_prompts(PROMPTS)[: len(states)], metas)


def event(g: DiffusersGenerator, batch: Sample) -> Any:
    """Two draws of each item."""
    num = batch.batch
    return g.draw(batch, DrawSpec(num_draws=2), Seeds(SEEDS[:num], SEEDS[:num] + 100))


@pytest.mark.parametrize(
    ("causal", "filled"),
    [(True, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]), (False, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])],
)
def test_latent_frames_that_frames_fill(causal: bool, filled: list[int]) -> None:
    """Eq. (1) of 0 to 9 frames, a latent frame standing for 4."""
    layout = replace(layout_of("wan"), causal=causal)
    assert [layout.latent_frames(n, 4) for n in range(10)] == filled


def test_what_is_scored_of_a_batch() -> None:
    """Eq. (2): of 9, 6 and 5 frames 3, 2 and 2 latent ones, less the first if it was given."""
    layout = layout_of("wan")
    options = DiffusersOptions(name_or_path="x", num_frames=9)
    metas: list[dict[str, int]] = [{}, {REAL_FRAMES: 6}, {REAL_FRAMES: 5}]
    inside = scored(metas, options, layout, 4)
    assert inside is not None and inside.shape == (3, 1, 3, 1, 1)
    assert inside.flatten(1).tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    given = scored(metas, options.model_copy(update={"given_frames": 1}), layout, 4)
    assert given is not None and given.flatten(1).int().tolist() == [
        [0, 1, 1],
        [0, 1, 0],
        [0, 1, 0],
    ]
    assert scored([{}, {}], options, layout, 4) is None


@pytest.mark.parametrize(("family", "num"), [("wan", 5), ("ltx", 5), ("ltx", 3)])
def test_scored_latents_hold_no_padding(folder: Any, family: str, num: int) -> None:
    """They are bit for bit those of the clip on its own, by a model of so many frames."""
    longer = made(folder(family), short_clips="mask")
    padded, facts = encoded(longer, num)
    alone, own = encoded(made(folder(family), num_frames=num), num)
    assert facts[REAL_FRAMES] == num and REAL_FRAMES not in own
    inside = scored([facts], longer.options, longer.layout, longer.factor[1])
    assert inside is not None
    kept = inside[0, 0, :, 0, 0]
    for name, value in alone.items():
        assert value.shape[1] == int(kept.sum()) < padded[name].shape[1]
        torch.testing.assert_close(padded[name][:, kept], value, rtol=1e-5, atol=1e-5)


def test_cogvideox_mixes_frames_in_its_norms(folder: Any) -> None:
    """As the module says; should this fail, it does not any more."""
    padded, _ = encoded(made(folder("cogvideox"), short_clips="mask"), 5)
    alone, _ = encoded(made(folder("cogvideox"), num_frames=5), 5)
    assert (padded["mean"][:, :2] - alone["mean"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox"])
def test_an_error_is_the_mean_over_what_is_scored(folder: Any, family: str) -> None:
    """A literal mean over the latent frames of Eq. (2), from the tensors of the same score.

    What the masked frames should have been does not matter, what the network makes of them neither.
    """
    g = made(folder(family), short_clips="mask", given_frames=1)
    k = g.factor[1]
    drawn = event(g, sample(g, 9, 5))
    with torch.no_grad():
        score = g.score(drawn, "policy", frozenset({"pred", "target"}))
    assert score.pred is not None and score.target is not None and score.error is not None
    ends = [8 // k + 1, 4 // k + 1]
    for i, end in enumerate(ends):
        off = (score.pred[i] - score.target[i])[:, :, 1:end].square()
        torch.testing.assert_close(score.error[i], off.flatten(1).mean(1))
        assert score.dims[i].tolist() == [off[0].numel()] * 2
        torch.testing.assert_close(score.logp[i], -0.5 * score.error[i])
    assert drawn.target is not None
    noise = torch.zeros_like(drawn.target)
    noise[:, :, :, 0], noise[1, :, :, ends[1] :] = 7.0, 7.0
    moved = replace(drawn, target=drawn.target + noise)
    pred = score.pred.flatten(0, 1)
    for other, shifted in ((moved, pred), (drawn, pred + noise.flatten(0, 1))):
        assert torch.equal(elbo_score(shifted, other, frozenset()).error, score.error)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox"])
def test_draws_are_those_without_a_mask(folder: Any, family: str) -> None:
    """The same noise at the same time of the same latents; only the mean is another."""
    masked, plain = made(folder(family), given_frames=1), made(folder(family))
    one, two = (event(g, sample(g, 9, 9)) for g in (masked, plain))
    assert SCORED not in sample(plain, 9).state and two.elem_mask is None
    for name in ("x_t", "time", "lam", "target", "mask"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    with torch.no_grad():
        scores = [
            g.score(e, "policy", frozenset({"pred"})) for g, e in ((masked, one), (plain, two))
        ]
    assert torch.equal(scores[0].pred, scores[1].pred)  # type: ignore[arg-type]
    assert not torch.equal(scores[0].logp, scores[1].logp)


def test_a_clip_does_not_depend_on_the_length_of_its_mates(folder: Any) -> None:
    g = made(folder("wan"), short_clips="mask")
    both = sample(g, 9, 5)
    drawn = event(g, both)
    with torch.no_grad():
        together = g.score(drawn, "policy").error
        for i in range(2):
            alone = g.score(drawn.items(slice(i, i + 1)), "policy").error
            assert together is not None and alone is not None
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_clips_that_leave_nothing_are_skipped_and_said(folder: Any) -> None:
    g = made(folder("wan"), short_clips="mask", given_frames=5)
    with pytest.raises(MediaError, match=r"a clip of 5 frames, of which none is left to score"):
        encoded(g, 5)
    _, facts = encoded(g, 9)
    assert REAL_FRAMES not in facts
    with pytest.raises(MediaError, match=r"a clip of 8 frames; model\.num_frames asks for 9"):
        encoded(made(folder("wan")), 8)
    keys = [made(folder("wan"), **c).media_key() for c in ({}, {"short_clips": "mask"})]
    assert keys[0] != keys[1] != g.media_key()
    assert made(folder("wan"), given_frames=5).media_key() == keys[0]  # the same latents


def test_refused(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.given_frames: 9 of 9 frames leave no latent"):
        made(folder("wan"), given_frames=9)
    still = pipeline_folder("sd", tmp_path / "sd")
    for key, value in (("short_clips", "mask"), ("given_frames", 1)):
        with pytest.raises(ModelError, match=rf"model\.{key}: this family makes pictures"):
            DiffusersGenerator(
                DiffusersOptions.model_validate({"name_or_path": str(still), key: value})
            )
    path = write_recipe(tmp_path)
    asked = ["model.short_clips=mask", "model.num_frames=5"]
    assert load_recipe(path, asked)
    for objective, why in (
        ("{type: dspo}", "dspo compares whole predictions"),
        ("{type: spo}", "spo is of samples of the policy"),
    ):
        with pytest.raises(RecipeError, match=rf"model\.short_clips: leaves .* and {why}"):
            load_recipe(path, [*asked, f"objective={objective}"])


def test_a_run_on_clips_of_mixed_lengths(folder: Any, tmp_path: Path) -> None:
    """Nothing is skipped, the margin starts at 0, and reference errors are kept and read again."""
    rows = []
    for i, lengths in enumerate([(9, 9), (9, 5), (6, 9), (5, 7)]):
        names = []
        for side, num in zip("wl", lengths, strict=True):
            name = f"{side}{i}.mp4"
            (tmp_path / name).write_bytes(mp4(moving(2 * i + (side == "w"), num, (32, 32))))
            names.append(name)
        rows.append({"prompt": PROMPTS[i % 2], "chosen": names[0], "rejected": names[1]})
    lora = {"r": 2, "lora_alpha": 2}
    model = {"type": "diffusers", "name_or_path": str(folder("wan")), "lora": lora, **CLIP}
    sections = {
        "model": {**model, "max_sequence_length": 32, "short_clips": "mask", "given_frames": 1},
        "objective": {"type": "dpo", "beta": 500},
        "data": {
            "type": "trl",
            "path": str(runs.write_jsonl(tmp_path / "p.jsonl", rows)),
            "media": "video",
        },
        "cache": {"dir": str(tmp_path / "cache"), "dtype": "float32", "reference": "always"},
        "train": {
            "learning_rate": 1e-2,
            "train_batch_size": 4,
            "max_train_steps": 2,
            "report_to": "none",
        },
    }
    first = runs.train(tmp_path, "a", sections)
    assert first["records"] == 4 and not first["data"]["skipped"]
    assert runs.losses(tmp_path / "a")[0] == pytest.approx(0.6931472, abs=1e-6)
    runs.train(tmp_path, "b", sections)
    one, two = (runs.weights(tmp_path / name, 2) for name in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
