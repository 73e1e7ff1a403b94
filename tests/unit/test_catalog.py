"""Finding and reading cards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from t2i_align import catalog
from t2i_align.errors import RecipeError, UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_and_a_wheel_are_found(tmp_path: Path) -> None:
    package = tmp_path / "t2i_align"
    package.mkdir()
    with pytest.raises(UserError) as caught:
        catalog.find_root(package)
    assert str(package / "_catalog") in str(caught.value)
    assert f"{tmp_path} (a checkout" in str(caught.value)
    (tmp_path / "pyproject.toml").touch()
    assert catalog.find_root(package) == tmp_path
    (package / "_catalog").mkdir()
    assert catalog.find_root(package) == package / "_catalog"


def test_this_package_is_in_a_checkout() -> None:
    assert catalog.find_root() == ROOT


def card_copy(folder: Path, edit: tuple[str, str] = ("", "")) -> Path:
    target = folder / "datasets" / "hpdv3"
    shutil.copytree(ROOT / "datasets" / "hpdv3", target, dirs_exist_ok=True)
    path = target / "card.yaml"
    path.write_text(path.read_text().replace(*edit))
    return path


def test_card_mistakes_are_located(tmp_path: Path) -> None:
    path = card_copy(tmp_path, ("license: MIT", "licence: MIT"))
    with pytest.raises(RecipeError) as caught:
        catalog.cards("datasets", tmp_path)
    text = [str(p) for p in caught.value.problems]
    assert any(t.startswith(f"{path}:8: licence: unknown key; allowed: ") for t in text)
    assert any("license: is missing; must be text" in t for t in text)


def test_a_card_is_named_after_its_folder(tmp_path: Path) -> None:
    card_copy(tmp_path, ("name: hpdv3", "name: hpdv4"))
    with pytest.raises(UserError, match=r"name is 'hpdv4' but the folder is 'hpdv3'"):
        catalog.cards("datasets", tmp_path)


def test_kinds_are_closed() -> None:
    with pytest.raises(UserError, match=r"unknown kind of card 'judges'; known: reward_models, "):
        catalog.cards("judges")


def test_an_empty_kind_is_no_error(tmp_path: Path) -> None:
    assert catalog.cards("eval", tmp_path) == []
    assert catalog.table([]) == "none yet"


def test_the_table_replaces_only_what_is_between_the_markers() -> None:
    text = f"# T\n\n{catalog.BEGIN}\nold\n{catalog.END}\n\nrest\n"
    new = catalog.with_table(text, catalog.cards("datasets"))
    assert new.startswith(f"# T\n\n{catalog.BEGIN}\n| name |")
    assert new.endswith(f"{catalog.END}\n\nrest\n")
    assert "old" not in new
    assert catalog.with_table(new, catalog.cards("datasets")) == new
    with pytest.raises(UserError, match="has no table markers"):
        catalog.with_table("# T\n", [])
