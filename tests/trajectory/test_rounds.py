"""Each round is the plain run it claims to be; a killed chain ends as if it never stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from t2i_align.errors import OutputError, RecipeError
from t2i_align.recipe import load_recipe
from t2i_align.rollout import generate as sampling
from t2i_align.train import rounds as module
from t2i_align.train.engine import Engine
from tests import runs
from tests.tiny import llama_folder, pipeline_folder

RESUME = "train.resume_from_checkpoint=latest"


def assert_same_policy(a: Path, b: Path, step: int) -> None:
    ours, theirs = runs.weights(a, step), runs.weights(b, step)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- staged data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.point_model(tmp_path_factory.mktemp("model"))


def staged(model: Path, folder: Path, **train: Any) -> dict[str, Any]:
    """Two stages of pairs on the plane."""
    for number in (1, 2):
        runs.point_pairs(folder / f"pairs{number}.jsonl", 24, seed=number)
    options = {"learning_rate": 1e-3, "train_batch_size": 4, "max_train_steps": 5} | train
    recipe = runs.voxel_sections(model, folder / "pairs1.jsonl", folder / "cache", **options)
    return recipe | {"rounds": {"data": [{"path": str(folder / "pairs2.jsonl")}]}}


def test_a_stage_starts_from_the_policy_before_which_is_its_reference(
    model: Path, tmp_path: Path
) -> None:
    """Stage 2 is bit for bit the plain run whose base model is the exported policy of stage 1."""
    recipe = staged(model, tmp_path)
    summary = runs.train(tmp_path, "rounds", recipe)
    first, second = (tmp_path / "rounds" / f"round-{k:02d}" for k in (1, 2))
    assert [r["round"] for r in summary["rounds"]] == ["round-01", "round-02"]
    assert json.loads((tmp_path / "rounds" / "summary.json").read_text()) == summary
    plain = {k: v for k, v in recipe.items() if k != "rounds"}
    runs.train(tmp_path, "one", plain)
    assert runs.losses(first) == runs.losses(tmp_path / "one")
    seed = json.loads((second / "run.json").read_text())["recipe"]["seed"]
    assert seed != 0
    based = plain | {"model": plain["model"] | {"name_or_path": str(first)}, "seed": seed}
    based["data"] = plain["data"] | {"path": str(tmp_path / "pairs2.jsonl")}
    runs.train(tmp_path, "two", based)
    assert runs.losses(second) == runs.losses(tmp_path / "two")
    assert_same_policy(second, tmp_path / "two", 5)
    assert runs.losses(second, "rewards/margins")[0] == 0.0


def test_stages_with_adapters_go_on_with_one_adapter(tmp_path: Path) -> None:
    """LoRA: the reference of stage 2 is the adapter of stage 1, not the base without one."""
    draws = torch.Generator().manual_seed(0)
    pick = lambda: torch.randint(0, 32, (6,), generator=draws).tolist()  # noqa: E731
    rows = [{"id": str(i), "prompt": "p", "chosen": pick(), "rejected": pick()} for i in range(16)]
    one = runs.write_jsonl(tmp_path / "one.jsonl", rows)
    two = runs.write_jsonl(tmp_path / "two.jsonl", rows[:8])
    lora = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    folder = str(llama_folder(tmp_path / "llama"))
    stage = {"type": "trl", "path": str(one), "media": "codes"}
    recipe = {
        "model": {"type": "token_lm", "name_or_path": folder, "num_codes": 32, "lora": lora},
        "objective": {"type": "dpo", "beta": 0.5},
        "data": stage,
        "cache": {"dir": str(tmp_path / "cache")},
        "train": {"report_to": "none", "learning_rate": 1e-2, "max_train_steps": 4},
        "rounds": {
            "data": [{"path": str(two)}, {"type": "trl", "path": str(one), "media": "codes"}]
        },
    }
    summary = runs.train(tmp_path, "run", recipe)
    assert [r["records"] for r in summary["rounds"]] == [16, 8, 16]
    before = runs.weights(tmp_path / "run" / "round-01", 4)
    after = runs.weights(tmp_path / "run" / "round-02", 4)
    moved = [(after[k] - v).abs().max().item() for k, v in before.items() if "lora_B" in k]
    assert max(moved) > 1e-3  # trained on
    for number in (1, 2, 3):
        margins = runs.losses(tmp_path / "run" / f"round-{number:02d}", "rewards/margins")
        assert margins[0] == 0.0 and margins[-1] != 0.0
    loaded = json.loads((tmp_path / "run" / "round-03" / "run.json").read_text())["recipe"]
    assert loaded["model"]["start_from"] == str(tmp_path / "run" / "round-02")


def test_sigkill_in_the_second_stage_and_continue(model: Path, tmp_path: Path) -> None:
    """Through the command line, killed without warning."""
    recipe = staged(model, tmp_path, max_train_steps=200, checkpointing_steps=20)
    runs.train(tmp_path, "whole", recipe)
    path = runs.write_recipe(tmp_path, "killed", recipe)
    command = [sys.executable, "-m", "t2i_align", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    second = tmp_path / "killed" / "round-02"
    end = time.monotonic() + 120
    while not (second / "checkpoints" / "step-00000020").is_dir():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (second / "summary.json").exists()
    first = tmp_path / "killed" / "round-01" / "summary.json"
    written = first.stat().st_mtime_ns
    subprocess.run([*command, RESUME], check=True, stderr=subprocess.DEVNULL)
    assert first.stat().st_mtime_ns == written  # not done again
    assert runs.losses(second) == runs.losses(tmp_path / "whole" / "round-02")
    assert_same_policy(second, tmp_path / "whole" / "round-02", 200)


# -- the policy's own samples


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder("sdxl", tmp_path_factory.mktemp("sdxl"))


def sampled(sdxl: Path, folder: Path, *, lora: bool = False, **samples: Any) -> dict[str, Any]:
    """Two rounds of pictures judged by their size, on the prompts of a few stored pairs."""
    data = folder / "pairs.parquet"
    if not data.exists():
        runs.pickapic(data, 5)
    model: dict[str, Any] = {"name_or_path": str(sdxl), "resolution": 64}
    options = {
        "label_by": {"judges": ["jpeg"]},
        "num_prompts": 3,
        "samples_per_prompt": 2,
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
    }
    return {
        "model": model | ({"lora": {"r": 4, "lora_alpha": 4}} if lora else {}),
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(folder / "cache"), "dtype": "float32"},
        "train": {
            "report_to": "none",
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "train_batch_size": 2,
            "max_train_steps": 4,
            "checkpointing_steps": 2,
        },
        "rounds": {"num_rounds": 2, "first": "samples", "samples": options | samples},
    }


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train(folder, "run", sampled(sdxl, folder))
    return folder / "run"


def test_each_round_draws_from_the_policy_of_the_one_before(sdxl: Path, whole: Path) -> None:
    """Base in round 1, exported policy of round 1 in round 2: the pictures ``generate`` makes."""
    for number, denoiser in ((1, None), (2, str(whole / "round-01" / "unet"))):
        from t2i_align.generators.diffusers_family import DiffusersGenerator
        from t2i_align.generators.diffusers_options import DiffusersOptions

        rows = [
            json.loads(x)
            for x in (whole / f"samples-{number:02d}" / "metadata.jsonl").read_text().splitlines()
        ]
        assert [r["denoiser"] for r in rows] == [None if number == 1 else "round-01"] * 6
        options = DiffusersOptions(name_or_path=str(sdxl), resolution=64)
        generator = DiffusersGenerator(options)
        sampling.load_weights(generator, None, denoiser)
        first = rows[:4]
        images = sampling.sample_images(
            generator,
            [r["prompt"] for r in first],
            [r["noise_seed"] for r in first],
            num_steps=2,
            guidance=1.5,
        )
        kept = pictures(whole / f"samples-{number:02d}")
        for row, image in zip(first, images, strict=True):
            assert np.array_equal(kept[row["file_name"]], np.asarray(image))
    one, two = (
        {json.loads(x)["noise_seed"] for x in (whole / f"samples-0{k}/metadata.jsonl").open()}
        for k in (1, 2)
    )
    assert not one & two


def test_rounds_take_the_next_prompts_and_start_over(whole: Path) -> None:
    """Five prompts of the data, three a round: 0 1 2, then 3 4 0."""
    found = []
    for number in (1, 2):
        lines = (whole / f"samples-{number:02d}" / "metadata.jsonl").read_text().splitlines()
        found += [json.loads(line)["prompt"] for line in lines][::2]
    assert found == [f"a photo of thing {k}" for k in (0, 1, 2, 3, 4, 0)]


def test_the_judge_decides_who_wins(whole: Path, sdxl: Path) -> None:
    """The records of round 2: of each prompt the picture that is smaller as a JPEG is chosen."""
    from t2i_align.data.label_source import build_source

    loaded = json.loads((whole / "round-02" / "run.json").read_text())["recipe"]
    assert loaded["data"]["label_by"]["group_by"] == "prompt"
    from t2i_align.data.folder import Folder, FolderOptions

    options = FolderOptions.model_validate(loaded["data"])
    records = list(build_source(Folder, options, str(whole.parent / "cache")))
    assert len(records) == 3
    for record in records:
        chosen, rejected = record.items
        assert chosen.prompt == rejected.prompt
        assert kilobytes(Path(chosen.media.data)) < kilobytes(Path(rejected.media.data))


def kilobytes(path: Path) -> float:
    """Size of a picture as a JPEG of quality 95; the judge wants it small."""
    stream = io.BytesIO()
    Image.open(path).convert("RGB").save(stream, "JPEG", quality=95)
    return stream.tell() / 1000


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    """Let the nth call of a function fail, once."""
    real, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == nth:
            raise RuntimeError("killed")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


STAGES = {
    "sampling of round 1": (sampling, "save_png", 3),
    "training of round 1": (Engine, "step", 3),
    "sampling of round 2": (sampling, "save_png", 9),
    "before the mark of round 2": (module, "_mark", 2),
    "training of round 2": (Engine, "step", 8),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_and_continued(
    stage: str, sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, losses and weights are those of the chain that was never stopped."""
    recipe = sampled(sdxl, tmp_path)
    owner, name, nth = STAGES[stage]
    with monkeypatch.context() as patch:
        killing(patch, owner, name, nth)
        with pytest.raises(RuntimeError, match="killed"):
            runs.train(tmp_path, "run", recipe)
    runs.train(tmp_path, "run", recipe, RESUME)
    for number in (1, 2):
        ours, theirs = (pictures(r / f"samples-0{number}") for r in (tmp_path / "run", whole))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
        folder = f"round-0{number}"
        assert runs.losses(tmp_path / "run" / folder) == runs.losses(whole / folder)
        assert_same_policy(tmp_path / "run" / folder, whole / folder, 4)


def test_killed_while_the_judges_work(
    sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2i_align.evaluate import scoring

    recipe = sampled(sdxl, tmp_path)
    with monkeypatch.context() as patch:
        killing(patch, scoring, "judged", 2)
        with pytest.raises(RuntimeError, match="killed"):
            runs.train(tmp_path, "run", recipe)
    runs.train(tmp_path, "run", recipe, RESUME)
    assert runs.losses(tmp_path / "run" / "round-02") == runs.losses(whole / "round-02")


def test_with_adapters_and_the_first_round_on_stored_pairs(sdxl: Path, tmp_path: Path) -> None:
    """LoRA: pictures of round 2 are those of the base with the exported adapter loaded."""
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    recipe = sampled(sdxl, tmp_path, lora=True)
    recipe["rounds"]["first"] = "data"
    summary = runs.train(tmp_path, "run", recipe)
    run = tmp_path / "run"
    assert [r["records"] for r in summary["rounds"]] == [5, 3]
    assert not (run / "samples-01").exists()
    generator = DiffusersGenerator(DiffusersOptions(name_or_path=str(sdxl), resolution=64))
    sampling.load_weights(generator, str(run / "round-01"), None)
    rows = [json.loads(x) for x in (run / "samples-02" / "metadata.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows[::2]] == [f"a photo of thing {k}" for k in range(3)]
    images = sampling.sample_images(
        generator,
        [r["prompt"] for r in rows[:4]],
        [r["noise_seed"] for r in rows[:4]],
        num_steps=2,
        guidance=1.5,
    )
    kept = pictures(run / "samples-02")
    for row, image in zip(rows[:4], images, strict=True):
        apart = np.abs(kept[row["file_name"]].astype(int) - np.asarray(image).astype(int))
        assert apart.max() <= 1  # adapters merged in another order of sums
    assert runs.losses(run / "round-02", "rewards/margins")[0] == 0.0


def test_pairs_of_the_embedded_world(tmp_path: Path) -> None:
    """``winners``: its exact judge puts the policy's wrong samples right."""
    import pyarrow.parquet as pq

    recipe = load_recipe(
        "scenes_rounds",
        [f"output_dir={tmp_path / 'out'}", "rounds.samples.num_prompts=6", "seed=3"],
    )
    console = Console(file=io.StringIO())
    tmp_path.joinpath("out").mkdir()
    data = module.data_of(recipe, 2, None, console)
    file = tmp_path / "out" / "samples-02.parquet"
    rows = pq.read_table(file).to_pylist()
    assert data.model_dump()["type"] == "pickapic" and data.model_dump()["path"] == str(file)
    assert rows and all({r["correct_0"], r["correct_1"]} == {True, False} for r in rows)
    assert all((r["label_0"] == 1) == r["correct_0"] for r in rows)
    assert {r[k][12:16] for r in rows for k in ("jpg_0", "jpg_1")} == {b"VP8L"}  # lossless WebP
    before = file.stat().st_mtime_ns
    assert module.data_of(recipe, 2, None, console) == data
    assert file.stat().st_mtime_ns == before  # not drawn again


# -- what is refused


def test_a_folder_of_other_rounds_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = staged(model, tmp_path)
    runs.train(tmp_path, "run", recipe)
    with pytest.raises(OutputError, match=r"already holds rounds\n.*resume_from_checkpoint=latest"):
        runs.train(tmp_path, "run", recipe)
    with pytest.raises(OutputError, match=r"another recipe: objective\.beta: 5\.0 -> 7\.0"):
        runs.train(tmp_path, "run", recipe, "objective.beta=7", RESUME)
    again = runs.train(tmp_path, "run", recipe, RESUME)  # all done: only read
    assert [r["steps"] for r in again["rounds"]] == [5, 5]
    plain = {k: v for k, v in recipe.items() if k != "rounds"}
    with pytest.raises(OutputError, match="holds no run of t2i-align"):
        runs.train(tmp_path, "run", plain)
    runs.train(tmp_path, "plain", plain)
    with pytest.raises(OutputError, match="holds no rounds of t2i-align"):
        runs.train(tmp_path, "plain", recipe)


WRONG = [
    ({"num_rounds": 2}, r"rounds: give exactly one of data \(staged\) and samples"),
    ({"data": [{}], "num_rounds": 2}, "num_rounds goes with samples"),
    ({"samples": {"winners": "repairs", "num_prompts": 2}}, "num_rounds is missing"),
    ({"num_rounds": 2, "samples": {}}, "give exactly one of label_by and winners"),
    (
        {"num_rounds": 2, "samples": {"winners": "repairs"}},
        "winners draws the world's own prompts: give num_prompts",
    ),
    (
        {"num_rounds": 2, "samples": {"label_by": {"judges": ["jpeg"]}}},
        r"rounds\.samples: judges look at pictures, and VoxelFlow makes voxels",
    ),
    ({"data": [{"path": "none.jsonl"}]}, r"rounds\.data\[0\]\.path: nothing at 'none\.jsonl'"),
    ({"data": [{"type": "trll"}]}, r"rounds\.data\[0\]\.type: got 'trll'; known sources: "),
    ({"data": [{"media": "voxel"}]}, r"rounds\.data\[0\]\.media: got the text 'voxel'"),
]


@pytest.mark.parametrize(("section", "said"), WRONG)
def test_wrong_sections_are_told_before_anything_runs(
    section: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    recipe = staged(model, tmp_path) | {"rounds": section}
    with pytest.raises(RecipeError, match=said):
        runs.train(tmp_path, "run", recipe)
    assert not (tmp_path / "run").exists()


def test_what_rounds_cannot_be_combined_with(model: Path, tmp_path: Path) -> None:
    recipe = staged(model, tmp_path)
    with pytest.raises(RecipeError, match="rounds are continued where they stopped"):
        runs.train(tmp_path, "run", recipe, f"train.resume_from_checkpoint={tmp_path}")
    recipe["model"]["lora"] = {"r": 2}
    with pytest.raises(RecipeError, match=r"reference\.mode: got 'adapters_off'"):
        runs.train(tmp_path, "run", recipe, "reference.mode=adapters_off")


def test_first_distinct_stops_reading_early() -> None:
    read = []

    def texts() -> Any:
        for text in "aabbcc":
            read.append(text)
            yield text

    assert module.first_distinct(texts(), 2) == ["a", "b"] and len(read) == 3
    assert module.first_distinct("abca", None) == ["a", "b", "c"]


def test_two_processes_share_the_rounds(model: Path, tmp_path: Path) -> None:
    """The process group outlives a round; 2 processes x 2 pairs are 1 process x 4 pairs."""
    recipe = staged(model, tmp_path)
    runs.train(tmp_path, "one", recipe)
    recipe["train"]["train_batch_size"] = 2
    path = runs.write_recipe(tmp_path, "two", recipe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    forced = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*launch, "-m", "t2i_align", "train", str(path)],
        env=os.environ | forced,
        check=True,
        timeout=280,
        stderr=subprocess.DEVNULL,
    )
    for number in (1, 2):
        one, two = (tmp_path / name / f"round-0{number}" for name in ("one", "two"))
        assert runs.losses(two) == pytest.approx(runs.losses(one), abs=2e-4)
