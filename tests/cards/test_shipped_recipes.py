"""Shipped recipes load, are commented, and hold the published numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipe_files import data_type, in_place, write_pipeline

from t2i_align.errors import RecipeError
from t2i_align.recipe import Recipe, load_recipe, shipped

WORLD = [name for name in shipped() if name.startswith("scenes_")]  # models made by hand first
NAMES = [name for name in shipped() if name not in WORLD]
BASES = ("scenes_base", "scenes_sd3_base")
CAPTIONS = ("scenes_tdpo", "scenes_tkto", "scenes_dcpo")  # their data is made by one command
ADAPTED = ("_spo", "_d3po", "_curriculum")  # published with LoRA, which their names leave out
DMPO = {"type": "dmpo", "alpha": 0.01}
ALPHA_DPO = {"type": "alpha_dpo", "alpha": 0.9999, "adaptive": True}


def loaded(name: str, tmp_path: Path) -> Recipe:
    return load_recipe(name, [in_place(name, tmp_path)])


@pytest.mark.parametrize("name", NAMES)
def test_loads_with_data_in_place(name: str, tmp_path: Path) -> None:
    recipe = loaded(name, tmp_path)
    assert (recipe.model.lora is not None) == ("lora" in name or name.endswith(ADAPTED))
    objective = recipe.objective.model_dump()
    said = {objective["type"], f"{objective['type']}_lora"}
    said |= {(objective.get("link") or {}).get("type")}
    said |= {"curriculum"} if recipe.data.model_dump()["curriculum"] else set()
    assert name.partition("_")[2].removesuffix("_8gb").removesuffix("_24gb") in said
    assert recipe.chosen("model").__name__ == "DiffusersGenerator"


@pytest.mark.parametrize("name", NAMES)
def test_without_data_the_message_names_the_path(name: str) -> None:
    key = "rollout.prompts" if data_type(name) == "none" else "data.path"
    path = re.search(rf"^  {key.partition('.')[2]}: (\S+)", shipped()[name].read_text(), re.M)
    assert path is not None
    with pytest.raises(RecipeError, match=rf"{key}: .*{re.escape(path.group(1))}"):
        load_recipe(name)


@pytest.mark.parametrize("name", sorted(set(WORLD) - {*BASES, *CAPTIONS}))
def test_recipes_on_bundled_pairs_need_no_file_of_the_user(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.name_or_path == "bundled/scenes_sdxl"


@pytest.mark.parametrize("name", BASES)
def test_the_recipe_of_a_base_loads_beside_its_files(name: str, tmp_path: Path) -> None:
    model, data = write_pipeline(tmp_path / "m"), tmp_path / "d.parquet"
    row = {"prompt": ["a"], "image": [b"0"], "label": [1]}
    pq.write_table(pa.table(row), data)
    given = [f"data.path={data}", f"model.name_or_path={model}"]
    recipe = load_recipe(name, given)
    assert recipe.model.name_or_path == str(model)


@pytest.mark.parametrize("name", [*NAMES, *WORLD])
def test_the_header_says_how_to_run_it_on_what_at_which_cost(name: str) -> None:
    lines = shipped()[name].read_text().splitlines()
    header = lines[: lines.index("")]
    assert len(lines) <= 60
    assert all(line.startswith("#") for line in header)
    text = "\n".join(header)
    for part in ("# Data:", "# Run:", "# Hardware:", "# Cost:"):
        assert part in text
    assert ("not measured" in text) == (name in NAMES)
    assert re.search(rf"t2i[-_]align train {name}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", [*NAMES, *WORLD])
def test_every_knob_is_commented(name: str) -> None:
    """Sections, types and names need no reason; every other key has one on its line."""
    free = {"output_dir", "type", "name_or_path"}
    for line in shipped()[name].read_text().splitlines():
        key, colon, rest = line.partition(":")
        if line.startswith("#") or not colon or not rest.strip() or key.strip() in free:
            continue
        assert "  # " in rest, line


@pytest.mark.parametrize(
    ("name", "beta", "warmup", "optimizer", "resolution"),
    [("sd15_dpo", 5000.0, 500, "adamw", 512), ("sdxl_dpo", 5000.0, 200, "adafactor", 1024)],
)
def test_published_numbers(
    name: str, beta: float, warmup: int, optimizer: str, resolution: int, tmp_path: Path
) -> None:
    """The released launchers: 2048 pairs a step, and 1e-8 a pair makes 2.048e-5."""
    recipe = loaded(name, tmp_path)
    train = recipe.train
    pairs = 16 * train.train_batch_size * train.gradient_accumulation_steps
    assert pairs == 2048
    assert train.scale_lr and train.learning_rate * pairs == pytest.approx(2.048e-5)
    assert (train.lr_scheduler, train.lr_warmup_steps) == ("constant_with_warmup", warmup)
    assert (train.optimizer, train.max_train_steps) == (optimizer, 2000)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.max_grad_norm) == (1e-2, 1.0)
    assert recipe.objective.model_dump()["beta"] == beta
    assert recipe.data.model_dump()["proportion_empty_prompts"] == 0.2
    assert recipe.data.model_dump()["ties"] == "drop"
    assert recipe.model.model_dump()["resolution"] == resolution
    assert recipe.model.lora is None and recipe.model.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "batch", "rate", "steps", "numbers"),
    [
        ("sd15_kto", 8, 1e-7, 10000, {"beta": 10000.0}),
        ("sdxl_mapo", 2048, 1e-7, 2000, {"beta": 0.1, "form": "released"}),
        ("sd15_dspo", 2048, 2.048e-5, 1000, {"beta": 0.001, "form": "sd15"}),
        ("sdxl_dspo", 2048, 2.048e-5, 700, {"beta": 1000.0, "form": "sdxl"}),
        ("sdxl_rankdpo", 1024, 1.024e-5, 400, {}),
        ("sd21_dcpo", 1024, 1.024e-5, 2000, {"beta": 500.0}),
        ("sdxl_dpo_safeguard", 2048, 2.048e-6, 2000, {"mu": 0.6}),
        ("sd15_inpo", 1024, 1.024e-5, 400, {"beta": 2000.0, "inversion_steps": 10}),
        ("sdxl_inpo", 1024, 1.024e-5, 400, {"beta": 5000.0, "inversion_eta": 0.1}),
        ("sd15_smpo", 1024, 1.024e-5, 200, {"beta": 2000.0, "inversion_steps": 5}),
        ("sdxl_smpo", 1024, 1.024e-5, 200, {"beta": 5000.0, "gamma": 10.0}),
    ],
)
def test_published_numbers_of_the_others(
    name: str, batch: int, rate: float, steps: int, numbers: dict[str, object], tmp_path: Path
) -> None:
    """Records a step on the 8 GPUs of their headers, the learning rate that results, the steps."""
    recipe = loaded(name, tmp_path)
    train = recipe.train
    records = 8 * train.train_batch_size * train.gradient_accumulation_steps
    assert (records, train.max_train_steps) == (batch, steps)
    assert train.learning_rate * (records if train.scale_lr else 1) == pytest.approx(rate)
    assert numbers.items() <= recipe.objective.model_dump().items()


@pytest.mark.parametrize(
    ("name", "batch", "rate", "steps", "warmup", "precision", "numbers"),
    [
        ("sd15_sft", 2048, 2.048e-6, 2000, 500, "fp16", {}),
        ("sd15_dpo_safeguard", 2048, 2.048e-5, 2000, 500, "bf16", {"beta": 5000.0, "mu": 0.9}),
        ("sd15_dmpo", 2048, 2.048e-5, 2000, 500, "bf16", {"beta": 2000.0, "link": DMPO}),
        ("sdxl_dmpo", 2048, 2.048e-6, 2000, 500, "bf16", {"beta": 6000.0, "link": DMPO}),
        ("sdxl_alpha_dpo", 2048, 1.678e-5, 2000, 200, "fp16", {"beta": 4000.0, "link": ALPHA_DPO}),
        ("sd21_curriculum", 8, 1e-4, 93750, 0, "fp16", {"beta": 2000.0}),
        ("sd15_d3po", 20, 3e-5, 8000, 0, "fp16", {"beta": 0.1, "eps": 0.1}),
        ("sd15_spo", 40, 6e-5, 8000, 0, "fp16", {"beta": 10.0, "eps": 0.1}),
        ("sdxl_spo", 16, 1e-5, 20000, 0, "fp16", {"beta": 10.0, "eps": 0.1}),
        ("sd15_diffusion_dro", 256, 1e-4, 1600, 0, "bf16", {"margin": 0.001}),
    ],
)
def test_published_schedules(
    name: str,
    batch: int,
    rate: float,
    steps: int,
    warmup: int,
    precision: str,
    numbers: dict[str, object],
    tmp_path: Path,
) -> None:
    """Records a step on the GPUs of the header's command, and what else a launcher says."""
    recipe = loaded(name, tmp_path)
    train = recipe.train
    found = re.search(r"--num_processes (\d+)", shipped()[name].read_text())
    records = train.train_batch_size * train.gradient_accumulation_steps
    records *= int(found.group(1)) if found else 1
    assert (records, train.max_train_steps) == (batch, steps)
    assert train.learning_rate * (records if train.scale_lr else 1) == pytest.approx(rate, rel=1e-3)
    scheduler = "constant_with_warmup" if warmup else "constant"
    assert (train.lr_scheduler, train.lr_warmup_steps) == (scheduler, warmup)
    assert train.mixed_precision == precision
    assert train.optimizer == ("adafactor" if "sdxl" in name and warmup else "adamw")
    assert numbers.items() <= recipe.objective.model_dump().items()


@pytest.mark.parametrize(
    ("name", "rank", "candidates", "threshold", "first", "prompts"),
    [
        ("sd15_spo", 4, 4, 0.3, 4, 10),
        ("sdxl_spo", 64, 2, 0.4, 4, 2),
        ("sd15_d3po", 4, 2, 0.0, 0, 10),
    ],
)
def test_published_trajectories(
    name: str,
    rank: int,
    candidates: int,
    threshold: float,
    first: int,
    prompts: int,
    tmp_path: Path,
) -> None:
    """DDIM with eta 1, 20 steps and guidance 5 for all three."""
    recipe = loaded(name, tmp_path)
    rollout, lora = recipe.rollout, recipe.model.lora
    assert rollout is not None and lora is not None
    assert (lora.r, lora.lora_alpha, recipe.train.weight_decay) == (rank, rank, 1e-4)
    assert (rollout.kernel, rollout.amount) == ("ddim", 1.0)
    assert (rollout.num_inference_steps, rollout.guidance_scale) == (20, 5.0)
    assert (rollout.num_candidates, rollout.threshold) == (candidates, threshold)
    assert (rollout.divert_start_step, rollout.batch_size) == (first, prompts)


def test_published_curriculum(tmp_path: Path) -> None:
    recipe = loaded("sd21_curriculum", tmp_path)
    data, lora = recipe.data.model_dump(), recipe.model.lora
    assert data["curriculum"] == {"chunks": 6, "passes_per_chunk": 1, "min_gap": 0.02}
    assert (data["proportion_empty_prompts"], data["max_records"]) == (0.25, 150000)
    assert lora is not None and (lora.r, lora.lora_alpha) == (8, 8)


@pytest.mark.parametrize(
    "name",
    ["dpo", "dpo_safeguard", "dmpo", "alpha_dpo", "dspo", "inpo", "smpo"],
)
def test_code_built_on_diffusion_dpo_feeds_constant_sizes(name: str, tmp_path: Path) -> None:
    """Of SDXL: [1024, 1024, 0, 0, 1024, 1024] whatever the picture's size was."""
    model = loaded(f"sdxl_{name}", tmp_path).model.model_dump()
    assert (model["time_ids"], model["resolution"]) == ("constant", 1024)
