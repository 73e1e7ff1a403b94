"""Pipelines by a declared layout: the proofs of every backbone, the list of them, what is refused.

The proofs are those of tests/backbones.py; the table of the docs is written from the same data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import ModelError
from t2i_align.generators.capture import flatten, unflatten
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.latents import decode, encode
from t2i_align.recipe import load_recipe
from tests import backbone_plans, backbones
from tests.backbone_table import (
    EXAMPLE,
    EXAMPLE_CASE,
    PATH,
    PROOFS,
    VERIFIED,
    document,
    verified,
)
from tests.backbones import PROMPTS, Case
from tests.cases_declared import CASES, REFUSED, generators, index_only
from tests.runs import losses
from tests.tiny import vae

BY_NAME = {case.name: case for case in CASES}
FIRST_TEN = [
    "AceStepPipeline",
    "AllegroPipeline",
    "AltDiffusionPipeline",
    "AmusedPipeline",
    "AnimateDiffPAGPipeline",
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "AnyFlowFARPipeline",
    "AnyFlowPipeline",
    "AudioLDM2Pipeline",
]


def guided(case: Case) -> float:
    assert case.guidance is not None
    return case.guidance


RUNS: dict[str, list[Callable[[Case, Path, Path], None]]] = {
    "images": [
        lambda case, folder, _: backbones.proves_images(case, folder, 1.0, None),
        lambda case, folder, _: backbones.proves_images(case, folder, guided(case), None),
        lambda case, folder, _: backbones.proves_images(case, folder, guided(case), case.odd),
    ],
    "score": [
        lambda case, folder, _: backbones.proves_score(case, folder, 1.0),
        lambda case, folder, _: backbones.proves_score(case, folder, guided(case)),
    ],
    "true_target": [lambda case, folder, _: backbones.proves_true_target(case, folder)],
    "ragged": [lambda case, folder, _: backbones.proves_ragged(case, folder)],
    "adapters": [lambda case, folder, _: backbones.proves_adapters(case, folder)],
    "training": [backbones.proves_training],
    "clock": [lambda case, folder, _: backbone_plans.proves_clock(case, folder)],
    "landing": [lambda case, folder, _: backbone_plans.proves_landing(case, folder)],
    "cond_shapes": [lambda case, folder, _: backbone_plans.proves_cond_shapes(case, folder)],
    "refusals": [lambda case, folder, _: backbone_plans.proves_refusals(case, folder)],
    "step": [lambda case, folder, _: backbone_plans.proves_step(case, folder)],
}
EACH = [
    (name, proof, i) for name in BY_NAME for proof, runs in RUNS.items() for i in range(len(runs))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by case, built once."""

    @cache
    def build(name: str) -> Path:
        where = tmp_path_factory.mktemp(name)
        BY_NAME[name].build(where)
        return where

    return build


@pytest.mark.parametrize(("name", "proof", "i"), EACH)
def test_the_proofs_of_every_backbone(
    folder: Any, tmp_path: Path, name: str, proof: str, i: int
) -> None:
    case = BY_NAME[name]
    if proof in case.fails:
        with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)):
            RUNS[proof][i](case, folder(name), tmp_path)
    else:
        RUNS[proof][i](case, folder(name), tmp_path)


def test_no_proof_is_left_out() -> None:
    """Neither here, nor in the table, nor in the families' tests; a reload is part of training."""
    modules = (backbones, backbone_plans)
    found = {n.removeprefix("proves_") for m in modules for n in vars(m) if n.startswith("proves_")}
    assert set(RUNS) == set(PROOFS) == found - {"reload"}
    assert {k: len(v) for k, v in RUNS.items()} == {k: p.runs for k, p in PROOFS.items()}
    source = Path(__file__).with_name("test_backbones.py").read_text()
    assert all(f".proves_{name}" in source for name in RUNS)


def test_the_first_ten_pipelines_of_diffusers_without_a_family_are_all_covered() -> None:
    """A new diffusers, or a new family, changes the list and is noticed here."""
    assert list(islice(generators(), 10)) == FIRST_TEN
    assert set(FIRST_TEN) <= BY_NAME.keys() | REFUSED.keys()
    assert BY_NAME.keys().isdisjoint(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_layout_describes_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    refused = REFUSED[name]
    (refused.build or (lambda where: index_only(where, name)))(tmp_path)
    options = {
        "name_or_path": str(tmp_path),
        "resolution": 32,
        "layout": refused.layout,
        **({"num_frames": 5} if refused.layout.get("media") == "video" else {}),
    }
    with pytest.raises(ModelError) as found:
        DiffusersGenerator(DiffusersOptions.model_validate(options)).encode_prompts(PROMPTS)
    assert refused.reason in str(found.value)


WRONG = {
    "model.layout.denoiser: AuraFlowPipeline has no unet": {"denoiser": "unet"},
    "model.layout.media: AuraFlowPipeline makes images": {"media": "video"},
    r"hands its denoiser latents \[1, 4, 8, 8\], not \[1, 64, 4\]": {"packing": "tokens"},
    "without 'x'; it passes hidden_states": {"sample_arg": "x"},
    "called its denoiser 1 times": {"branches": "two_calls"},
    "does not repeat 'pooled' for every frame": {"frame_args": ["pooled"]},
    "needs the shapes of one item": {"cond_shapes": {}},
}


@pytest.mark.parametrize(("match", "changes"), WRONG.items())
def test_a_wrong_layout_says_what_the_pipeline_does(
    folder: Any, match: str, changes: dict[str, Any]
) -> None:
    case = BY_NAME["AuraFlowPipeline"]
    layout = case.options["layout"] | changes
    options = case.options | {"name_or_path": str(folder(case.name)), "layout": layout}
    guidance = 2.0 if "branches" in changes else 1.0
    with pytest.raises(ModelError, match=match):
        g = DiffusersGenerator(DiffusersOptions.model_validate(options))
        g.prepare_sampling(PROMPTS[:1], num_steps=1, guidance=guidance)
        g.example(1)


LIES = [
    ("AuraFlowPipeline", {"sign": -1}),
    ("AuraFlowPipeline", {"time_factor": 1.0}),
    ("AuraFlowPipeline", {"branches": "cond_first"}),
    ("AnyFlowPipeline", {"time_factor": 0.5}),
    ("AllegroPipeline", {"prediction": "v_prediction"}),
    ("AnimateDiffPipeline", {"prediction": "v_prediction"}),
    ("BriaPipeline", {"prediction": "epsilon"}),
    ("CogView3PlusPipeline", {"prediction": "epsilon"}),
]


@pytest.mark.parametrize(("name", "changes"), LIES)
def test_the_proofs_find_a_layout_that_is_accepted_but_wrong(
    folder: Any, name: str, changes: dict[str, Any]
) -> None:
    """What no check can see from shapes and names, the pipeline's pictures or scheduler show."""
    case = BY_NAME[name]
    layout = case.options["layout"] | changes
    lie = replace(case, options=case.options | {"layout": layout})
    with pytest.raises(AssertionError):
        if "prediction" in changes:
            backbone_plans.proves_landing(lie, folder(name))
        else:
            backbones.proves_images(lie, folder(name), guided(case), None)


def test_position_ids_keep_a_declared_run_to_one_size(folder: Any) -> None:
    """No buckets, and the cache's key knows the size and the layout."""
    case = BY_NAME["BriaPipeline"]
    options = case.options | {"name_or_path": str(folder(case.name))}
    with pytest.raises(ModelError, match=r"model\.aspect_buckets: a declared layout"):
        DiffusersGenerator(DiffusersOptions.model_validate(options | {"aspect_buckets": {}}))
    keys = [
        DiffusersGenerator(DiffusersOptions.model_validate(options | changes)).text_key()
        for changes in ({}, {"resolution": 128}, {"sample_size": (64, 96)})
    ]
    assert keys[0] != keys[1] and keys[0] == keys[2]


def test_frames_in_whole_groups(folder: Any) -> None:
    """Allegro's 24 frames are 6 latent frames; 25 are refused."""
    case = BY_NAME["AllegroPipeline"]
    options = case.options | {"name_or_path": str(folder(case.name))}
    g = DiffusersGenerator(DiffusersOptions.model_validate(options))
    assert g.latent_shape(g.size)[1] == 6
    with pytest.raises(ModelError, match="num_frames: 25 is not a multiple of 4"):
        DiffusersGenerator(DiffusersOptions.model_validate(options | {"num_frames": 25}))


def test_the_frames_codec_is_the_picture_codec_on_every_frame() -> None:
    torch.manual_seed(0)
    coder = vae()
    clips = torch.randn(2, 3, 3, 16, 16)
    mean, std = encode(coder, clips, "frames")
    back = decode(coder, mean, "frames")
    assert std is not None and back.shape == clips.shape
    for f in range(3):
        one, spread = encode(coder, clips[:, :, f], "image")
        assert spread is not None
        torch.testing.assert_close(mean[:, :, f], one)
        torch.testing.assert_close(std[:, :, f], spread)
        torch.testing.assert_close(back[:, :, f], decode(coder, one, "image"))


def test_nested_arguments_survive_the_cache() -> None:
    """Tuples of tuples of tensors, shared although as long as the batch, and layers in a list."""
    ids = torch.arange(6).view(2, 3)
    layers = [torch.randn(2, 4, 5) for _ in range(2)]
    given = {"rope": ((ids, ids + 1), (ids,)), "layers": layers, "mask": torch.ones(2, 4)}
    flat = flatten(given, 2, shared=("rope",))
    assert all(len(v) == 2 for v in flat.values())
    back = unflatten(flat)
    assert torch.equal(back["rope"][0][1], ids + 1) and torch.equal(back["rope"][1][0], ids)
    assert all(torch.equal(a, b) for a, b in zip(back["layers"], layers, strict=True))
    assert torch.equal(unflatten({k: v[:1] for k, v in flat.items()})["mask"], given["mask"][:1])


def test_the_recipe_of_the_docs_trains(folder: Any, tmp_path: Path) -> None:
    """Read as a recipe file, with only the paths changed; then trained."""
    from io import StringIO

    from rich.console import Console

    from t2i_align.train.run import train

    case = BY_NAME[EXAMPLE_CASE]
    recipe = tmp_path / "declared.yaml"
    recipe.write_text(EXAMPLE)
    paths = {
        "output_dir": tmp_path / "run",
        "model.name_or_path": folder(case.name),
        "data.path": backbones.pairs(tmp_path, 64, 1),
        "cache.dir": tmp_path / "cache",
        "model.resolution": 64,
        "train.max_train_steps": 2,
        "train.checkpointing_steps": 1,
    }
    loaded = load_recipe(recipe, [f"{k}={v}" for k, v in paths.items()])
    assert isinstance(loaded.model, DiffusersOptions) and loaded.model.layout is not None
    assert loaded.model.layout.time_factor == 1e-3
    train(loaded, Console(file=StringIO()))
    assert len(losses(tmp_path / "run")) == 2


def test_the_table_of_the_docs_is_the_one_generated_from_the_cases() -> None:
    assert PATH.read_text() == document(), "run python -m tests.backbone_table --write"
    assert VERIFIED.read_text() == verified(), "run python -m tests.backbone_table --write"
