"""`eval --beside`, with and without a cluster, from the command to the page, on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.evaluate import ray_run
from t2i_align.evaluate.beside import embedder, pictures_of
from t2i_align.evaluate.metrics.diversity import embedding_diversity
from t2i_align.evaluate.ray_run import Cluster
from t2i_align.evaluate.run import Request
from t2i_align.evaluate.sampling import load_model, sample
from tests.tiny import pipeline_folder

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
PROMPTS = (
    "Prompts\tCategory\na photo of a red car\tColors\n"
    "a photo of a bed left of a car\tPositional\na photo of a blue elephant\tColors\n"
)


def call(*args: str) -> tuple[int, str]:
    result = RUNNER.invoke(build_app(), list(args))
    return result.exit_code, f"{result.stdout}{result.stderr}{result.exception or ''}"


def command(place: Path, model: str, out: str) -> list[str]:
    """Three prompts, two pictures each, under the learned judge and one that is held out."""
    options = [f"prompts={place / 'p.tsv'}", "judge=scenes_clip", "images_per_prompt=2"]
    words = ["eval", "drawbench", "--model", str(place / model), "--out", str(place / out)]
    for option in (*options, "held_out=[scenes_exact, sharpness]"):
        words += ["--set", option]
    sampler = ["--num-inference-steps", "1", "--resolution", "64", "--batch-size", "4"]
    return [*words, *sampler, "--num-threads", "1", "--guidance-scale", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny SDXL, the second with a louder UNet, and an evaluation of the first."""
    place = tmp_path_factory.mktemp("beside")
    (place / "p.tsv").write_text(PROMPTS)
    pipeline_folder("sdxl", place / "first")
    pipeline_folder("sdxl", place / "second")
    (file,) = (place / "second" / "unet").glob("*.safetensors")
    weights = {k: v * 1.5 if k.startswith("conv_out") else v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    code, text = call(*command(place, "first", "base"))
    assert code == 0, text
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def in_this_process(
    request: Request, rows: Sequence[Mapping[str, Any]], cluster: Cluster
) -> Iterator[dict[str, Any]]:
    """What actors of a cluster do with their pieces, last piece first."""
    assert request.model is not None
    generator = load_model(request.model, request.sampling, "cpu")
    for row in reversed(rows):
        seeds = [int(s) for s in row["seeds"]]
        images = sample(generator, list(row["prompts"]), seeds, request.sampling)
        made = [ray_run._png(image) for image in images]
        yield {"piece": row["piece"], "files": made, "node": f"of {cluster.num_workers}"}


def test_numbers_stand_beside_the_score(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn here and on a stand-in for a cluster: equal pictures; file, terminal and page agree."""
    base, page = str(place / "base"), tmp_path / "page.html"
    more = ["--beside", base, "--embedding", "scenes_clip", "--report", str(page)]
    code, text = call(*command(place, "second", "after"), *more)
    assert code == 0, text
    after = place / "after"
    found = json.loads((after / "beside.json").read_text())
    assert (found["pictures"], found["prompts"]) == (6, 3) and found["base"] == base
    embed = embedder("scenes_clip")
    for side, suffix in ((after, ""), (place / "base", "_base")):
        for row in found["diversity"]:
            pair = [Image.open(f).convert("RGB") for f in pictures_of(side)[row["id"]].values()]
            own = embedding_diversity(embed(pair))
            assert row[f"embedding{suffix}"] == pytest.approx(own, abs=1e-6)
    assert {r["statistic"] for r in found["drift"]} >= {"saturation", "sharpness"}
    assert any(r["distance"] > 0 for r in found["drift"])
    roles = {r["judge"]: (r["role"], r["win_rate"] is None) for r in found["held_out"]}
    assert roles == {
        "scenes_clip": ("counts", False),
        "scenes_exact": ("held out", False),
        "sharpness": ("held out", True),
    }
    html = page.read_text()
    for title in ("Diversity", "Drift", "Held-out judges"):
        assert f"<h3>{title}</h3>" in html and re.search(rf"^{title}", text, re.MULTILINE)
    assert "scenes_exact" in html and "hue of pixels, degrees" in html

    monkeypatch.setattr(ray_run, "drawn", in_this_process)
    cluster = ["--ray-workers", "2", *more]
    code, text = call(*command(place, "second", "spread"), *cluster)
    assert code == 0, text
    assert len(files(after)) == 6 and files(place / "spread") == files(after)
    spread = json.loads((place / "spread" / "beside.json").read_text())
    assert {k: v for k, v in spread.items() if k != "folder"} == {
        k: v for k, v in found.items() if k != "folder"
    }


def test_pictures_made_elsewhere_have_it_too(place: Path, tmp_path: Path) -> None:
    """Flat names <id>_<number>.png, which lie outside of the evaluation."""
    given = tmp_path / "given"
    given.mkdir()
    for name, content in files(place / "base").items():
        _, item, _, number = Path(name).with_suffix("").parts
        (given / f"{item}_{int(number)}.png").write_bytes(content)
    words = command(place, "first", "flat")
    at = words.index("--model")
    words[at : at + 2] = ["--images", str(given)]
    more = ["--beside", str(place / "base"), "--embedding", "scenes_clip"]
    despite = [w for n in SAID for w in ("--despite", n)]
    code, text = call(*words, *more)
    assert code == 3 and "were not evaluated alike" in text
    code, text = call(*words, *more, *despite)
    assert code == 0, text
    found = json.loads((place / "flat" / "beside.json").read_text())
    assert {r["distance"] for r in found["drift"]} == {0.0}
    for row in found["diversity"]:
        assert row["embedding"] == row["embedding_base"]


# what nobody says of pictures made elsewhere
SAID = (
    *("seed", "num_inference_steps", "guidance_scale", "resolution", "negative_prompt"),
    *("precision", "scheduler"),
)


def test_what_cannot_work_is_said_first(place: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o")]
    bare = ["eval", "scenes", "--images", str(tmp_path), *out]
    code, text = call(*bare, "--ray-workers", "2")
    assert code == 2 and "needs --model" in text
    code, text = call(*bare, "--ray-address", "auto")
    assert code == 2 and "needs --ray-workers" in text
    code, text = call(*command(place, "second", "never"), "--beside", str(tmp_path))
    assert code == 3 and "holds no pictures" in text and not (place / "never").exists()
    code, text = call("eval", "suite", "quick", *bare[2:], "--beside", str(tmp_path))
    assert code == 2 and "takes no --beside" in text
