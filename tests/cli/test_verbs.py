"""The verbs, as a shell sees them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recipe_files import in_place, write_pairs, write_recipe
from typer.testing import CliRunner

from t2i_align import __version__
from t2i_align.cli import VERBS, build_app
from t2i_align.data import SOURCES
from t2i_align.errors import EXIT_CODES
from t2i_align.generators import GENERATORS
from t2i_align.generators.layouts import FAMILIES
from t2i_align.listing import LISTS
from t2i_align.objectives import OBJECTIVES
from t2i_align.recipe import load_recipe, shipped

# Wide, so that tables do not fold words; plain, so that text can be compared.
RUNNER = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
HEAVY = {"torch", "diffusers", "transformers", "numpy", "pyarrow"}


def call(*args: str) -> tuple[int, str, str]:
    result = RUNNER.invoke(build_app(), list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def ok(*args: str) -> str:
    code, out, err = call(*args)
    assert code == 0, err
    return out


def modules_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after running ``code``."""
    script = f"import sys\n{code}\nprint('modules:', *{{m.split('.')[0] for m in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("modules:")[2].split())


def verb(*args: str) -> str:
    """Python text that runs a verb and survives its exit."""
    argv = ["t2i-align", *args]
    return (
        f"from t2i_align.cli import main\nsys.argv = {argv!r}\ntry: main()\nexcept SystemExit: pass"
    )


def test_importing_and_help_load_nothing_heavy() -> None:
    assert not HEAVY & modules_after("import t2i_align")
    assert not HEAVY & modules_after(verb("--help"))
    for name in VERBS:
        assert not HEAVY & modules_after(verb(name, "--help")), name


def test_light_verbs_load_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    calls = [("ls", "--json"), ("schema",), ("cp", "sd15_dpo", str(tmp_path)), ("cite", "sd15_dpo")]
    for args in calls:
        assert not {"diffusers", "transformers"} & modules_after(verb(*args)), args
    for args in [("ls", "recipes"), ("ls", "datasets"), ("cp", "sd15_dpo", str(tmp_path / "x"))]:
        assert "torch" not in modules_after(verb(*args)), args


def test_help_lists_every_verb_and_every_exit_code() -> None:
    text = " ".join(ok("--help").split())
    assert all(f" {name} " in text for name in VERBS)
    for number, meaning in EXIT_CODES.items():
        assert f"{number} {meaning}" in text


def test_version_is_single_sourced() -> None:
    assert ok("--version") == f"t2i-align {__version__}\n"


def test_usage_errors_exit_2() -> None:
    for args in (["trian"], ["train"], ["ls", "--jsn"], ["cp", "x"]):
        assert call(*args)[0] == 2, args


def test_python_dash_m_is_the_same_program() -> None:
    run = [sys.executable, "-m", "t2i_align", "--version"]
    assert subprocess.check_output(run, text=True) == f"t2i-align {__version__}\n"


@pytest.mark.parametrize("kind", LISTS)
def test_ls_shows_in_the_table_what_json_holds(kind: str) -> None:
    rows: list[dict[str, Any]] = json.loads(ok("ls", kind, "--json"))
    text = ok("ls", kind)
    assert kind in text
    for row in rows:
        assert next(iter(row)) == "name"
        assert row["summary"]
        assert all(str(value) in text for value in row.values())
    if not rows:
        assert f"{kind}: none yet" in text


def test_ls_knows_the_tables() -> None:
    names = {kind: {r["name"] for r in json.loads(ok("ls", kind, "--json"))} for kind in LISTS}
    assert names["recipes"] == set(shipped())
    assert names["objectives"] == set(OBJECTIVES)
    families = {f"diffusers: {name}" for name in FAMILIES}
    assert names["generators"] >= {*GENERATORS, *families, "diffusers: AuraFlowPipeline"}
    assert names["sources"] == set(SOURCES)
    assert names["datasets"] >= {"pickapic_v2", "hpdv3"}
    everything = json.loads(ok("ls", "--json"))
    assert {(r["kind"], r["name"]) for r in everything} >= {
        ("recipes", "sd15_dpo"),
        ("sources", "trl"),
    }


def test_ls_of_a_wrong_kind_suggests_the_right_one() -> None:
    code, _, err = call("ls", "recipe")
    assert (code, err) == (
        2,
        "error: nothing called 'recipe' to list\n  fix: did you mean 'recipes'?\n",
    )


def test_cp_copies_once(tmp_path: Path) -> None:
    dest = tmp_path / "new" / "mine.yaml"
    assert ok("cp", "sd15_dpo", str(dest)) == f"wrote {dest}\n"
    code, _, err = call("cp", "sd15_dpo", str(dest))
    assert code == 1
    assert err == f"error: '{dest}' exists and is not overwritten\n  fix: choose another name\n"


def test_schema_to_stdout_and_to_a_file_are_the_same(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "schema.json"
    assert f"$schema={out}" in ok("schema", str(out))
    assert json.loads(out.read_text()) == json.loads(ok("schema"))


def test_validate_prints_every_problem_and_exits_2(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("learning_rate", "learning_rat"), ("r: 8", "r: 0"))
    code, _, err = call("validate", str(path))
    assert code == 2
    assert err.startswith(
        f"error: {path}: 2 problems\n  {path}:7: model.lora.r: got the number 0; "
    )
    assert "did you mean 'learning_rate'?" in err


def test_validate_json_lists_problems_as_data(tmp_path: Path) -> None:
    code, out, _ = call("validate", str(write_recipe(tmp_path)), "train.lr=1", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (2, False)
    assert [(p["key"], p["where"]) for p in found["problems"]] == [("train.lr", "command line")]


def test_validate_a_shipped_recipe_prints_plan_and_checks(tmp_path: Path) -> None:
    from t2i_align.checks import CHECKS

    args = ["validate", "sd15_dpo_lora_8gb", f"data.path={write_pairs(tmp_path / 'd.parquet')}"]
    text = ok(*args)
    found = json.loads(ok(*args, "--json"))
    assert found["ok"] and found["plan"] and found["notes"] == []
    assert [(c["name"], c["ok"]) for c in found["checks"]] == [(c.name, True) for c in CHECKS]
    assert all(c.name in text and c.about in text for c in CHECKS)
    assert text.rstrip().endswith("the recipe is valid")


@pytest.mark.parametrize("name", [n for n in shipped() if not n.startswith("scenes_")])
def test_every_shipped_recipe_has_a_plan(name: str, tmp_path: Path) -> None:
    """On a machine without GPU and without the model, at full size."""
    plan = json.loads(ok("validate", name, in_place(name, tmp_path), "--json"))["plan"]
    assert 0 < plan["trainable_parameters"] <= plan["parameters"]
    adapters = load_recipe(name, [in_place(name, tmp_path)]).model.lora is not None
    assert (plan["trainable_parameters"] < plan["parameters"]) == adapters


def test_validate_says_when_only_this_machine_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = write_pairs(tmp_path / "d.parquet")
    args = ["sd15_dpo_lora_8gb", f"data.path={data}", "train.mixed_precision=fp16"]
    text = ok("validate", *args)
    assert "not here: Mixed precision fp16 runs on CUDA only" in text
    assert "on this machine: train.mixed_precision: got 'fp16', which needs a CUDA device" in text
    assert text.rstrip().endswith("the recipe is valid, but would not train here")
    code, _, err = call("train", *args)
    assert code == 2
    assert "command line: train.mixed_precision: got 'fp16', which needs a CUDA device" in err


def test_user_errors_carry_their_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from t2i_align import errors
    from t2i_align.train import run

    path = str(write_recipe(tmp_path))
    for kind in errors.UserError.__subclasses__():
        if kind is errors.RecipeError:
            continue

        def fail(*_: object, kind: type[errors.UserError] = kind) -> None:
            raise kind("it broke [so]", "mend it")

        monkeypatch.setattr(run, "train", fail)
        code, _, err = call("train", path)
        assert code == kind.exit_code
        assert code in EXIT_CODES
        assert err == "error: it broke [so]\n  fix: mend it\n"


def test_commands_of_a_group_carry_exit_codes_too(tmp_path: Path) -> None:
    code, _, err = call("scenes", "pairs", str(tmp_path / "p"), "--model", str(tmp_path / "no"))
    assert code == 4 and "no diffusers pipeline" in err
    code, _, err = call("scenes", "sdxl", str(tmp_path / "x"))
    assert code == 2 and "--vae" in err
    text = ok("scenes", "--help")
    for name in ("vae", "sdxl", "sd3", "renders", "pairs", "clip", "vlm"):
        assert f" {name} " in text and ok("scenes", name, "--help")


def test_ctrl_c_outside_a_run_exits_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from t2i_align.train import run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert call("train", str(write_recipe(tmp_path)))[0] == 130


def test_cite_gives_each_paper_once() -> None:
    text = ok("cite", "sdxl_dpo_lora_24gb")
    keys = [
        line.partition("{")[2].rstrip(",") for line in text.splitlines() if line.startswith("@")
    ]
    assert keys == ["wallace2024diffusion", "podell2024sdxl", "kirstain2023pick"]


def test_cite_of_sft_has_no_objective_paper() -> None:
    assert "wallace2024" not in ok("cite", "sdxl_sft_lora_24gb")


def test_cite_finds_data_by_hub_id() -> None:
    text = ok("cite", "sd15_dpo", "data.path=null", "data.hub_id=yuvalkirstain/pickapic_v1")
    assert "kirstain2023pick" in text
    assert "kirstain2023pick" not in ok("cite", "sd15_dpo", "data.path=elsewhere/x.parquet")
