"""Reference errors that are kept on disk, through real runs of the trainer.

Every claim compares a run that reads the cache with one that asks its reference each time.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from t2i_align.data.reference_cache import ReferenceStore
from t2i_align.errors import RecipeError, TrainingError
from t2i_align.generators.views import Views
from t2i_align.recipe import load_recipe
from t2i_align.train.loop import Run
from t2i_align.train.plan import plan
from t2i_align.train.run import train
from tests import runs
from tests.tiny import llama_folder

LN2 = 0.6931472


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.point_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.point_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 10, seed=0)


@pytest.fixture
def sections(model: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    options = {"learning_rate": 1e-3, "train_batch_size": 2, "max_train_steps": 8}
    return runs.voxel_sections(model, data, tmp_path / "cache", **options)


def run(
    folder: Path, name: str, sections: dict[str, Any], *overrides: str
) -> tuple[dict[str, Any], str]:
    """Summary of a run, and what it said of its reference cache."""
    console = Console(file=io.StringIO(), width=400)
    path = runs.write_recipe(folder, name, sections)
    summary = train(load_recipe(path, overrides), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return summary, "".join(x for x in text.splitlines() if x.startswith("reference cache"))


SIDES = ("chosen", "rejected")
ALWAYS = "cache.reference=always"
NEVER = "cache.reference=never"


def test_a_second_run_reads_what_the_first_paid_for(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """A sweep: the same recipe gives the same bits; another beta, rate and objective find all."""
    _, said = run(tmp_path, "never", sections, NEVER)
    assert said == "reference cache: off: cache.reference: never"
    first, said = run(tmp_path, "first", sections, ALWAYS)
    assert said.endswith("on: cache.reference: always; 0 items and draws are there")
    assert first["reference_cache"] == {"read": 0, "scored": 32}
    second, said = run(tmp_path, "second", sections)  # auto finds it
    assert "on: an earlier run or cache build left" in said and "32 items" in said
    assert second["reference_cache"] == {"read": 32, "scored": 0}
    curve = runs.losses(tmp_path / "never")
    assert curve[0] == pytest.approx(LN2, abs=1e-6) and curve[7] != curve[0]
    assert runs.losses(tmp_path / "first") == curve == runs.losses(tmp_path / "second")
    ours, theirs = runs.weights(tmp_path / "never", 8), runs.weights(tmp_path / "second", 8)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for changed in ("objective.beta=1", "train.learning_rate=0.01", "train.train_batch_size=4"):
        found, _ = run(tmp_path, changed, sections, changed)
        expected = 64 if "batch" in changed else 32
        assert sum(found["reference_cache"].values()) == expected
        assert found["reference_cache"]["read"] >= 32
    other, _ = run(tmp_path, "dpop", sections | {"objective": {"type": "dpop"}})
    assert other["reference_cache"] == {"read": 32, "scored": 0}


def test_in_another_batch_the_loss_agrees_to_rounding_and_the_margin_starts_at_0(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """Written by batches of 2, read by batches of 5, where kernels may round otherwise."""
    run(tmp_path, "first", sections, ALWAYS, "train.max_train_steps=10")
    five = ("train.train_batch_size=5", "train.max_train_steps=4")
    summary, _ = run(tmp_path, "read", sections, ALWAYS, *five)
    assert summary["reference_cache"] == {"read": 40, "scored": 0}
    run(tmp_path, "live", sections, NEVER, *five)
    read, live = runs.losses(tmp_path / "read"), runs.losses(tmp_path / "live")
    assert read == pytest.approx(live, abs=1e-5)
    assert runs.losses(tmp_path / "read", "rewards/margins")[0] == pytest.approx(0.0, abs=1e-5)


def test_passes_that_go_round_in_two_draws_pay_for_two(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """Six passes over ten pairs in two draws each: 40 items are scored, 80 read."""
    round_two = ("draw.num_distinct=2", "train.max_train_steps=30")
    summary, said = run(tmp_path, "kept", sections, *round_two)
    assert "on: 6 passes go round in 2 draws, the first 2 pay for it" in said
    assert summary["reference_cache"] == {"read": 80, "scored": 40}
    run(tmp_path, "live", sections, NEVER, *round_two)
    kept, live = runs.losses(tmp_path / "kept"), runs.losses(tmp_path / "live")
    assert kept[:10] == live[:10] and kept == pytest.approx(live, abs=2e-4)
    _, said = run(tmp_path, "fresh", sections, "train.max_train_steps=30", "seed=1")
    assert "off: each of 6 passes has draws of its own, met once" in said


def test_resumed_with_a_cache_is_bitwise(sections: dict[str, Any], tmp_path: Path) -> None:
    """Stopped in the second pass; the resumed run reads what the first had read."""
    often = ("draw.num_distinct=1", "train.checkpointing_steps=7")
    run(tmp_path, "whole", sections, *often, "train.max_train_steps=14")
    apart = sections | {"cache": sections["cache"] | {"dir": str(tmp_path / "other")}}
    run(tmp_path, "cut", apart, *often, "train.max_train_steps=7")
    longer = ("train.max_train_steps=14", "train.resume_from_checkpoint=latest")
    run(tmp_path, "cut", apart, *often, *longer)
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")


def test_another_model_has_a_place_of_its_own(sections: dict[str, Any], tmp_path: Path) -> None:
    """Other weights, another draw spec: nothing is found, and auto keeps nothing."""
    run(tmp_path, "first", sections, ALWAYS)
    other = runs.point_model(tmp_path / "other", seed=4)
    moved = sections | {"model": sections["model"] | {"name_or_path": str(other)}}
    summary, said = run(tmp_path, "moved", moved)
    assert "off: each of" in said and "reference_cache" not in summary
    assert "off: each of" in run(tmp_path, "spec", sections, "draw.max_level=0.5")[1]
    assert "off: each of" in run(tmp_path, "seed", sections, "seed=7")[1]  # same place
    seeded, _ = run(tmp_path, "seed again", sections, "seed=7", ALWAYS)
    assert seeded["reference_cache"] == {"read": 0, "scored": 32}


def swap_values(folder: Path) -> Path:
    """Other numbers in the only part of a cache, hashes included."""
    from safetensors.torch import load_file, save_file

    from t2i_align.data.cache import HASH, tensors_sha256

    (part,) = (folder / "cache" / "v1").glob("reference-*/part-*.safetensors")
    wrong = load_file(part)
    wrong["values"] = wrong["values"] * 1.5
    save_file(wrong, part, metadata={HASH: tensors_sha256(wrong)})
    return part


def test_numbers_of_another_model_stop_the_run(sections: dict[str, Any], tmp_path: Path) -> None:
    """A space whose values were swapped by hand, hashes included, is noticed at the first read."""
    run(tmp_path, "first", sections, ALWAYS)
    part = swap_values(tmp_path)
    with pytest.raises(TrainingError, match="is not of this reference: log-likelihoods differ"):
        run(tmp_path, "second", sections)
    part.write_bytes(part.read_bytes()[:-3])  # a broken one is set aside and paid for again
    again, _ = run(tmp_path, "third", sections, ALWAYS)
    assert again["reference_cache"] == {"read": 0, "scored": 32}


NO_COPY = "the reference cache has all that this run asks: no copy of the network is made"


def copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run from here on made a copy of its network for the reference."""
    made: list[bool] = []
    own = Views.settle_reference

    def noted(views: Views, *, needed: bool) -> None:
        own(views, needed=needed)
        made.append(views.reference is not None)
        assert views.reference is not views.module

    monkeypatch.setattr(Views, "settle_reference", noted)
    return made


def test_a_full_cache_leaves_the_reference_unmade(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training, resumed as well: no second network, the same bits as with one; a run that
    asks one record more makes it, and asks it.
    """
    made = copies(monkeypatch)
    often = "train.checkpointing_steps=5"
    run(tmp_path, "first", sections, ALWAYS, often)
    summary, said = run(tmp_path, "second", sections, often)
    assert said.endswith("32 items and draws are there") and made == [True, False]
    assert summary["reference_cache"] == {"read": 32, "scored": 0}
    again = ("train.resume_from_checkpoint=latest", often)
    for folder in (tmp_path / "second" / "checkpoints").glob("step-*8"):
        shutil.rmtree(folder)
    run(tmp_path, "second", sections, *again)
    assert made == [True, False, False]
    ours, theirs = runs.weights(tmp_path / "first", 8), runs.weights(tmp_path / "second", 8)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert runs.losses(tmp_path / "first") == runs.losses(tmp_path / "second")
    run(tmp_path, "second", sections, *again)  # nothing is left to do
    assert made.pop()
    longer, _ = run(tmp_path, "longer", sections, ALWAYS, "train.max_train_steps=9")
    assert made[3:] == [True] and longer["reference_cache"] == {"read": 32, "scored": 4}


def test_errors_that_vanish_meanwhile_are_told(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "first", sections, ALWAYS)
    own = ReferenceStore.get
    asked: list[Any] = []

    def get(store: ReferenceStore, keys: Any) -> Any:
        asked.append(keys)
        return None if len(asked) > 12 else own(store, keys)  # 8 steps, one look, then training

    monkeypatch.setattr(ReferenceStore, "get", get)
    with pytest.raises(TrainingError, match=r"lacks an error that it had.*\n.*cache\.dir; when"):
        run(tmp_path, "second", sections, "train.checkpointing_steps=1")
    monkeypatch.undo()
    again, _ = run(tmp_path, "second", sections, "train.resume_from_checkpoint=latest")
    assert again["steps"] == 8


@pytest.mark.parametrize("size", [1, 4])
def test_a_run_that_goes_on_with_another_batch_size_asks_what_it_will_meet(
    size: int, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 5 ten of sixteen records are seen. Three steps of 1 meet known ones.

    Of three steps of 4 the last two hold unknown ones, so the copy is made after all.
    """
    made = copies(monkeypatch)
    run(tmp_path, "first", sections, ALWAYS)
    short = ("train.checkpointing_steps=5",)
    run(tmp_path, "second", sections, *short)
    for folder in (tmp_path / "second" / "checkpoints").glob("step-*8"):
        shutil.rmtree(folder)
    again = (f"train.train_batch_size={size}", "train.resume_from_checkpoint=latest", *short)
    summary, _ = run(tmp_path, "second", sections, *again)
    assert made == [True, False, size == 4]
    scored = {1: 0, 4: 16}[size]
    assert summary["reference_cache"] == {"read": 6 * size - scored, "scored": scored}


def test_nothing_can_ask_a_reference_that_was_not_made(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """Half of the memory: the views hold one network, and scoring by the other view is an error."""
    run(tmp_path, "first", sections, ALWAYS)
    console = Console(file=io.StringIO(), width=400)
    path = runs.write_recipe(tmp_path, "second", sections)
    found = Run(load_recipe(path), console)
    assert NO_COPY in console.file.getvalue()  # type: ignore[attr-defined]
    assert found.generator.views.reference is None
    drawn = found.feed.at(0)  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="lacks an error that it had"):
        found.generator.score(drawn.event, "reference")
    found.feed.close()


def test_the_plan_says_what_the_copy_costs(sections: dict[str, Any], tmp_path: Path) -> None:
    """Without it the peak is lower by exactly its weights; `never` has no such line."""
    path = runs.write_recipe(tmp_path, "planned", sections)
    memory = plan(load_recipe(path)).memory
    assert memory["reference copy"] == memory["weights"] > 0
    assert memory["peak, reference all cached"] == memory["peak"] - memory["weights"]
    assert "peak, reference all cached" not in plan(load_recipe(path, (NEVER,))).memory


def test_weights_of_an_earlier_run_are_a_reference_that_needs_no_copy_either(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.start_from: other numbers than the base's, read in the next run."""
    run(tmp_path, "base", sections, NEVER)
    on = f"model.start_from={tmp_path / 'base'}"
    run(tmp_path, "live", sections, NEVER, on)
    made = copies(monkeypatch)
    first, _ = run(tmp_path, "first", sections, ALWAYS, on)
    second, _ = run(tmp_path, "second", sections, on)
    assert (first["reference_cache"]["scored"], second["reference_cache"]["scored"]) == (32, 0)
    assert made == [True, False]
    curve = runs.losses(tmp_path / "live")
    assert curve == runs.losses(tmp_path / "first") == runs.losses(tmp_path / "second")
    assert curve[0] == pytest.approx(LN2, abs=1e-6) and curve != runs.losses(tmp_path / "base")


def test_wrong_numbers_are_noticed_where_the_copy_is_made_too(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    """A longer run makes its reference, and holds the first batch it reads against that."""
    run(tmp_path, "first", sections, ALWAYS)
    swap_values(tmp_path)
    with pytest.raises(TrainingError, match="is not of this reference: log-likelihoods differ"):
        run(tmp_path, "longer", sections, ALWAYS, "train.max_train_steps=9")
    assert not list((tmp_path / "longer" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("objective", "more", "reason"),
    [
        ({"type": "dpo"}, ("reference.refresh=hard",), "refresh 'hard' moves the reference"),
        ({"type": "sft"}, (), "sft has no reference"),
        ({"type": "inpo"}, (), "inpo finds its noise by inverting samples"),
        ({"type": "dspo"}, (), "dspo compares whole predictions"),
    ],
)
def test_what_may_not_be_kept_is_refused_with_the_reason(
    sections: dict[str, Any],
    tmp_path: Path,
    objective: dict[str, Any],
    more: tuple[str, ...],
    reason: str,
) -> None:
    path = runs.write_recipe(tmp_path, "refused", sections | {"objective": objective})
    with pytest.raises(RecipeError, match=r"cache\.reference: got 'always', but") as caught:
        load_recipe(path, (ALWAYS, *more))
    assert reason in str(caught.value)
    load_recipe(path, more)  # auto goes without


def test_adapters_off_is_one_reference_for_every_rank_and_start(tmp_path: Path) -> None:
    """LoRA on a token model, ragged texts and codes: curves agree bit for bit, another rank reads
    the same numbers, and the margin of a second run starts at 0.
    """
    draws = torch.Generator().manual_seed(0)
    rows = [
        {"id": str(i), "prompt": "p" * (i + 1)}
        | {k: torch.randint(0, 32, (4 + i % 3,), generator=draws).tolist() for k in SIDES}
        for i in range(6)
    ]
    data = runs.write_jsonl(tmp_path / "codes.jsonl", rows)
    lora = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    tokens: dict[str, Any] = {
        "model": {
            "type": "token_lm",
            "name_or_path": str(llama_folder(tmp_path / "llama")),
            "num_codes": 32,
            "lora": lora,
        },
        "objective": {"type": "dpo", "beta": 0.5},
        "data": {"type": "trl", "path": str(data), "media": "codes"},
        "cache": {"dir": str(tmp_path / "cache")},
        "train": {"report_to": "none", "lr_scheduler": "constant", "learning_rate": 0.01}
        | {"train_batch_size": 2, "max_train_steps": 3},
    }
    run(tmp_path, "live", tokens, NEVER)
    run(tmp_path, "first", tokens, ALWAYS)
    second, _ = run(tmp_path, "second", tokens)
    assert second["reference_cache"] == {"read": 12, "scored": 0}
    curve = runs.losses(tmp_path / "second")
    assert curve == runs.losses(tmp_path / "live") == runs.losses(tmp_path / "first")
    assert curve[0] == pytest.approx(LN2, abs=1e-6) and curve[2] != curve[0]
    wide = tokens | {"model": tokens["model"] | {"lora": lora | {"r": 8}}}
    summary, _ = run(tmp_path, "wide", wide)
    assert summary["reference_cache"] == {"read": 12, "scored": 0}
    on = f"model.start_from={tmp_path / 'first'}"  # trained adapters on: another reference
    summary, said = run(tmp_path, "started", tokens, on)
    assert "off: each of" in said and "reference_cache" not in summary


def test_a_moving_reference_is_asked_each_time(sections: dict[str, Any], tmp_path: Path) -> None:
    """Also where draws come again and an earlier run left the numbers of its start."""
    run(tmp_path, "first", sections, ALWAYS)
    moving = ("reference.refresh=soft", "reference.refresh_steps=2", "draw.num_distinct=1")
    summary, said = run(tmp_path, "moving", sections, *moving)
    assert "off: reference.refresh 'soft' moves" in said and "reference_cache" not in summary
