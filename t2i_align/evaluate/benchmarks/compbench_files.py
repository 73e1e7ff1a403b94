"""T2I-CompBench's prompt files: a folder as the repository's examples/dataset, one prompt a line.

The eight test sets, the two lists that split the complex one, and the list of countable objects are
not part of the package. The card says where each is published and what its bytes hash to. They are
looked for in the option's folder, else in ``<home>/t2i_compbench`` or its ``dataset`` folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.answers import file_sha256
from t2i_align.evaluate.prompt_files import CUSTOM, OFFICIAL, home
from t2i_align.judges.weight_files import combined

NAME = "t2i_compbench"
FILES = {
    "color": "color_val.txt",
    "shape": "shape_val.txt",
    "texture": "texture_val.txt",
    "spatial": "spatial_val.txt",
    "3d_spatial": "3d_spatial_val.txt",
    "numeracy": "numeracy_val.txt",
    "non_spatial": "non_spatial_val.txt",
    "complex": "complex_val.txt",
}
OBJECTS = "new_objects.txt"
SPATIAL_PART, ACTION_PART = "complex_val_spatial.txt", "complex_val_action.txt"


@dataclass(frozen=True)
class Files:
    """The files some categories need.

    Args:
        folder: that holds them.
        sha256: of each, by name.
        kind: ``official`` if all are those of the card, else ``custom``.
    """

    folder: Path
    sha256: dict[str, str]
    kind: str

    def lines(self, name: str) -> list[str]:
        """The prompts of a file, ends of lines and empty lines gone.

        Raises:
            DataError: it is not UTF-8 text, or holds nothing.
        """
        found = [line for line in map(str.strip, self.text(name).splitlines()) if line]
        if not found:
            raise DataError(f"{self.folder / name} holds no line", "bring the file again")
        return found

    def text(self, name: str) -> str:
        """A whole file.

        Raises:
            DataError: it is not UTF-8 text.
        """
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"cannot read {self.folder / name}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What a result says of them: one hash over names and hashes."""
        named = (f"{name}\0{sha256}" for name, sha256 in sorted(self.sha256.items()))
        return {"prompts": self.kind, "prompts_sha256": combined(named)}


def needed(categories: tuple[str, ...]) -> list[str]:
    """Names of the files of some categories."""
    found = [FILES[category] for category in categories]
    found += [OBJECTS] if "numeracy" in categories else []
    return found + ([SPATIAL_PART, ACTION_PART] if "complex" in categories else [])


def published() -> dict[str, str]:
    """SHA-256 of every file of the card, by name."""
    from t2i_align.catalog import find_root, read_card

    card = read_card(find_root() / "eval" / NAME / "card.yaml")
    return {entry["file"]: entry["sha256"] for entry in card.details["files"]}


def find(categories: tuple[str, ...], given: str | None) -> Files:
    """The files of some categories.

    Args:
        categories: of :data:`FILES`.
        given: a folder, or None for the usual places, where only the published files will do.

    Raises:
        DataError: some are not there; or, in the usual place, have other bytes.
    """
    names, known = needed(categories), published()
    places = [Path(given).expanduser()] if given else [home() / NAME / "dataset", home() / NAME]
    folder = next((p for p in places if (p / names[0]).is_file()), places[-1])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"T2I-CompBench: {', '.join(missing)} not in {folder}",
            f"run `t2i-align eval fetch {NAME}`, or name their folder with --set prompts=FOLDER",
        )
    sha256 = {name: file_sha256(folder / name) for name in names}
    other = [name for name in names if sha256[name] != known[name]]
    if other and not given:
        raise DataError(
            f"T2I-CompBench: {', '.join(other)} in {folder} not as published",
            f"run `t2i-align eval fetch {NAME}`, or use them as 'custom' with "
            f"--set prompts={folder}",
        )
    return Files(folder, sha256, CUSTOM if other else OFFICIAL)
