"""Families of diffusers against their stock pipelines; the proofs are in tests/backbones.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import backbone_plans, backbones, cases_flux, cases_image, cases_language, cases_video

GROUPS = (cases_flux, cases_image, cases_language, cases_video)
CASES = {case.name: case for group in GROUPS for case in group.CASES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by case, built once."""

    @cache
    def build(name: str) -> Path:
        where = tmp_path_factory.mktemp(name)
        CASES[name].build(where)
        return where

    return build


@pytest.fixture
def prove(folder: Any) -> Callable[..., None]:
    """Run a proof on a case; one that it is said to fail must fail."""

    def run(name: str, proof: Callable[..., None], *more: Any) -> None:
        case = CASES[name]
        if proof.__name__.removeprefix("proves_") in case.fails:
            with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)):
                proof(case, folder(name), *more)
        else:
            proof(case, folder(name), *more)

    return run


def scale_of(name: str, guided: bool) -> float:
    """The case's own, or 1."""
    return (CASES[name].guidance or 1.0) if guided else 1.0


def test_every_failure_names_a_proof() -> None:
    proofs = {n for module in (backbones, backbone_plans) for n in vars(module)}
    for case in CASES.values():
        assert {f"proves_{name}" for name in case.fails} <= proofs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("guided", [False, True])
def test_images_equal_the_pipeline(prove: Any, name: str, guided: bool) -> None:
    prove(name, backbones.proves_images, scale_of(name, guided), None)


@pytest.mark.parametrize("name", CASES)
def test_images_of_an_odd_aspect_equal_the_pipeline(prove: Any, name: str) -> None:
    prove(name, backbones.proves_images, scale_of(name, True), CASES[name].odd)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("guided", [False, True])
def test_score_equals_what_the_pipelines_loop_predicts(prove: Any, name: str, guided: bool) -> None:
    prove(name, backbones.proves_score, scale_of(name, guided))


@pytest.mark.parametrize("name", CASES)
def test_true_target_step_moves_towards_the_data(prove: Any, name: str) -> None:
    prove(name, backbones.proves_true_target)


@pytest.mark.parametrize("name", CASES)
def test_errors_do_not_depend_on_mates_or_draws(prove: Any, name: str) -> None:
    prove(name, backbones.proves_ragged)


@pytest.mark.parametrize("name", CASES)
def test_adapters_off_is_the_base_and_only_they_train(prove: Any, name: str) -> None:
    prove(name, backbones.proves_adapters)


@pytest.mark.parametrize("name", CASES)
def test_train_resume_export_and_reload(prove: Any, tmp_path: Path, name: str) -> None:
    prove(name, backbones.proves_training, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_training_noises_by_the_pipelines_own_clock(prove: Any, name: str) -> None:
    prove(name, backbone_plans.proves_clock)


@pytest.mark.parametrize("name", CASES)
def test_the_scheduler_told_the_target_ends_at_the_data(prove: Any, name: str) -> None:
    prove(name, backbone_plans.proves_landing)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_has_the_shapes_that_encoders_give(prove: Any, name: str) -> None:
    prove(name, backbone_plans.proves_cond_shapes)


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_do_not_fit_are_refused(prove: Any, name: str) -> None:
    prove(name, backbone_plans.proves_refusals)


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_adapters_only(prove: Any, name: str) -> None:
    prove(name, backbone_plans.proves_step)
