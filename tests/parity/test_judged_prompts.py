"""Official prompt files of the judge benchmarks: hashes of the cards, counts of the papers."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from t2i_align.catalog import find_root, read_card
from t2i_align.errors import DataError
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.metrics.text_rendering import text_scores

DRAWBENCH = {"Reddit": 38, "Colors": 25, "Text": 21, "DALL-E": 20, "Descriptions": 20}
DRAWBENCH |= {"Positional": 20, "Counting": 19, "Conflicting": 10, "Gary Marcus et al.": 10}
DRAWBENCH |= {"Misspellings": 10, "Rare Words": 7}


@pytest.fixture(autouse=True)
def published(benchmarks_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Found where ``eval fetch`` would have put them."""
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(benchmarks_dir))
    return benchmarks_dir


@pytest.mark.parametrize("name", ["parti_prompts", "drawbench", "text_rendering"])
def test_the_card_has_the_hash_of_the_file(name: str, published: Path) -> None:
    facts = read_card(find_root() / "eval" / name / "card.yaml").details["prompts"]
    file = published / facts.get("folder", name) / facts["file"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == facts["sha256"]


def test_parti_prompts() -> None:
    items = build("parti_prompts", {}).items()
    assert len(items) == len({i.prompt for i in items}) == 1632
    assert len({i.task for i in items}) == 12
    assert len({i.metadata["challenge"] for i in items}) == 11
    assert sum('"' in i.prompt for i in items) == 22  # which a CSV reader would take away


def test_drawbench() -> None:
    items = build("drawbench", {}).items()
    assert Counter(i.task for i in items) == DRAWBENCH and len(items) == 200
    assert not any("\r" in i.prompt for i in items)


def test_hpsv2() -> None:
    bench = build("hpsv2_bench", {})
    items = bench.items()
    assert Counter(i.task for i in items) == dict.fromkeys(
        ("anime", "concept-art", "paintings", "photo"), 800
    )
    assert len({i.id for i in items}) == 3200 and len({i.prompt for i in items}) == 3172
    assert bench.prompt_identity()["prompts"] == "official"  # type: ignore[attr-defined]


def test_a_changed_text_is_custom(published: Path, tmp_path: Path) -> None:
    for source in (published / "hpdv2").glob("*.json"):
        text = source.read_text()
        changed = text.replace("hamster", "gerbil") if source.stem == "anime" else text
        (tmp_path / source.name).write_text(changed)
    options = {"prompts": str(tmp_path)}
    known = build("hpsv2_bench", options), build("hpsv2_bench", options | {"styles": ["photo"]})
    kinds = [b.prompt_identity()["prompts"] for b in known]  # type: ignore[attr-defined]
    assert kinds == ["custom", "official"]


def test_every_prompt_quotes_one_text() -> None:
    items = build("text_rendering", {"held_out": []}).items()
    assert len(items) == 1018
    for item in items:
        target = item.metadata["target"]
        assert f'"{target}"' in item.prompt
        right = text_scores(target, target)
        assert (right.exact, right.similarity, right.words, right.reward) == (1, 1, 1, 1)


def test_another_file_under_the_published_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path))
    (tmp_path / "drawbench").mkdir()
    (tmp_path / "drawbench" / "DrawBench.tsv").write_text("Prompts\tCategory\na\tb\n")
    with pytest.raises(DataError, match="is not the published file"):
        build("drawbench", {}).items()
