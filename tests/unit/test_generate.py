"""``generate``: reproducible by prompt, resumable, and honest about what is in its folder."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from t2i_align.errors import DataError, ModelError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.process.seeds import normals
from t2i_align.rollout.generate import Settings, generate, load_weights, read_prompts
from tests import runs
from tests.tiny import pipeline_folder

QUICK = Settings(num_inference_steps=2, guidance_scale=3.0, images_per_prompt=2, batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder("sdxl", tmp_path_factory.mktemp("sdxl"))


def generator(folder: Path) -> DiffusersGenerator:
    made = DiffusersGenerator(DiffusersOptions(name_or_path=str(folder), resolution=64))
    load_weights(made, None, None)
    return made


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_depend_on_the_prompt_not_on_its_place(folder: Path, tmp_path: Path) -> None:
    g, quiet = generator(folder), Console(file=io.StringIO())
    assert generate(g, ["a cat", "a dog"], QUICK, tmp_path / "a", quiet) == 4
    assert generate(g, ["a dog"], QUICK, tmp_path / "b", quiet) == 2
    for image in ("00", "01"):
        one = pixels(tmp_path / "a" / f"00001-{image}.png")
        two = pixels(tmp_path / "b" / f"00000-{image}.png")
        assert np.abs(one - two).max() <= 1
    first, second = (pixels(tmp_path / "a" / f"00001-0{k}.png") for k in (0, 1))
    assert (first != second).any()
    rows = [json.loads(x) for x in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows][:2] == ["00000-00.png", "00000-01.png"]
    assert rows[2]["prompt"] == "a dog" and rows[2]["num_inference_steps"] == 2


def test_continues_and_refuses_other_settings(folder: Path, tmp_path: Path) -> None:
    g, quiet = generator(folder), Console(file=io.StringIO())
    generate(g, ["a cat"], QUICK, tmp_path, quiet)
    kept = (tmp_path / "00000-00.png").read_bytes()
    (tmp_path / "00000-01.png").unlink()
    assert generate(g, ["a cat"], QUICK, tmp_path, quiet) == 1
    assert (tmp_path / "00000-00.png").read_bytes() == kept
    with pytest.raises(DataError, match="nothing in it was touched"):
        generate(g, ["another"], QUICK, tmp_path, quiet)
    with pytest.raises(DataError, match="nothing in it was touched"):
        generate(g, ["a cat"], replace(QUICK, lora="adapter"), tmp_path, quiet)


def test_adapter_and_full_weights_change_the_picture(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    data = runs.pickapic(tmp_path / "p.parquet", 8)
    sections = {
        "model": {"name_or_path": str(folder), "resolution": 64, "lora": {"r": 2, "lora_alpha": 2}},
        "objective": {"type": "dpo", "beta": 100.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(tmp_path / "cache")},
        "train": {
            "report_to": "none",
            "learning_rate": 1e-2,
            "max_train_steps": 3,
            "train_batch_size": 4,
        },
    }
    runs.train(tmp_path, "lora", sections)
    del sections["model"]["lora"]
    runs.train(tmp_path, "full", sections)
    quiet = Console(file=io.StringIO())
    tuned = UNet2DConditionModel.from_pretrained(tmp_path / "full" / "unet")
    tuned.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")  # as a 10 GB UNet is saved
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    generate(generator(folder), ["a cat"], QUICK, tmp_path / "base", quiet)
    for name, lora, denoiser in (
        ("lora", str(tmp_path / "lora"), None),
        ("full", None, str(tmp_path / "full" / "unet")),
        ("sharded", None, str(tmp_path / "sharded")),
    ):
        made = DiffusersGenerator(DiffusersOptions(name_or_path=str(folder), resolution=64))
        load_weights(made, lora, denoiser)
        generate(made, ["a cat"], QUICK, tmp_path / f"{name}-pictures", quiet)
        a = pixels(tmp_path / "base" / "00000-00.png")
        assert (a != pixels(tmp_path / f"{name}-pictures" / "00000-00.png")).any(), name
    with pytest.raises(ModelError, match="--lora: cannot load"):
        load_weights(generator(folder), str(tmp_path / "nothing"), None)
    with pytest.raises(ModelError, match="--denoiser: no weights of a UNet2DConditionModel"):
        load_weights(generator(folder), None, str(tmp_path))


def test_other_weights_are_read_instead_of_the_bases(folder: Path, tmp_path: Path) -> None:
    base = generator(folder)
    with torch.no_grad():
        for parameter in base.module.parameters():
            parameter.add_(0.25)
    base.export(str(tmp_path))
    bare = shutil.copytree(folder, tmp_path / "bare")
    for file in (bare / "unet").glob("*.safetensors"):
        file.unlink()
    made = DiffusersGenerator(DiffusersOptions(name_or_path=str(bare), resolution=64))
    load_weights(made, None, str(tmp_path / "unet"))
    found = made.module.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in base.module.state_dict().items())


def test_prompt_files(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a cat\n\na dog\n")
    assert read_prompts(text) == ["a cat", "a dog"]
    lines = runs.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"promt": "y"}])
    with pytest.raises(DataError, match=r"p\.jsonl:2 is no JSON object with a 'prompt'"):
        read_prompts(lines)
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / "e.txt")
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(tmp_path / "missing.txt")


def test_torch_global_generator_is_not_used(folder: Path, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        generate(generator(folder), ["a cat"], QUICK, tmp_path / name, quiet)
    one, two = (tmp_path / n / "00000-00.png" for n in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def said_by(*args: str, fails: bool) -> str:
    """What the verb prints."""
    from typer.testing import CliRunner

    from t2i_align.cli import build_app

    result = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(build_app(), list(args))
    assert (result.exit_code != 0) is fails, result.output
    return result.output


def test_size_is_height_and_width_of_the_files(folder: Path, tmp_path: Path) -> None:
    """The flag is the recipe key: the same pixels as by ``model.sample_size``, and the pipeline's.

    Nothing but the size decides, so another --size does not go on in the same folder.
    """
    call = ["generate", "--model", str(folder), "--prompt", "a cat", "--seed", "3"]
    call += ["--num-inference-steps", "2", "--guidance-scale", "3"]
    said_by(*call, "--size", "64x96", "--out", str(tmp_path / "a"), fails=False)
    found = pixels(tmp_path / "a" / "00000-00.png")
    assert found.shape == (64, 96, 3)
    (row,) = map(json.loads, (tmp_path / "a" / "metadata.jsonl").read_text().splitlines())
    assert row["size"] == [64, 96]
    options = {"name_or_path": str(folder), "resolution": 64, "sample_size": (64, 96)}
    made = DiffusersGenerator(DiffusersOptions.model_validate(options))
    load_weights(made, None, None)
    settings = Settings(num_inference_steps=2, guidance_scale=3.0, seed=3)
    generate(made, ["a cat"], settings, tmp_path / "b", Console(file=io.StringIO()))
    assert (found == pixels(tmp_path / "b" / "00000-00.png")).all()
    noise = normals(torch.tensor([row["noise_seed"]]), (4, 8, 12))
    pipe = made.pipe
    stock = pipe(
        "a cat", height=64, width=96, num_inference_steps=2, guidance_scale=3.0, latents=noise
    ).images[0]
    assert np.abs(found - np.asarray(stock).astype(int)).max() <= 1
    told = said_by(*call, "--size", "96x64", "--out", str(tmp_path / "a"), fails=True)
    assert "nothing in it was touched" in told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", "big"], "--size: 'big' is no HxW"),
        (["--size", "64x64", "--resolution", "64"], "--size and --resolution both say how large"),
        (["--size", "60x100"], "--size: 60 x 100 are not positive multiples of 8"),
        (["--size", "60x100"], "fix: use 56x96"),
        (["--size", "0x64"], "--size: 0 x 64 are not positive multiples of 8"),
        (["--resolution", "68"], "--resolution: 68 is not a multiple of 8"),
        (["--num-frames", "5"], "--num-frames: this family makes pictures"),
    ],
)
def test_sizes_that_do_not_fit_are_told_by_their_option(
    folder: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    out = ["--prompt", "a", "--out", str(tmp_path / "o")]
    assert said in said_by("generate", "--model", str(folder), *out, *given, fails=True)
    assert not (tmp_path / "o").exists()


def test_a_unet_with_a_vae_of_factor_four_keeps_the_pipelines_rule(tmp_path: Path) -> None:
    """60 is a multiple of 4, but the stock SDXL pipeline takes multiples of 8 only."""
    call = ["--prompt", "a", "--out", str(tmp_path / "o"), "--size", "60x100"]
    said = said_by("generate", "--model", "bundled/scenes_sdxl", *call, fails=True)
    assert "--size: 60 x 100 are not positive multiples of 8" in said
