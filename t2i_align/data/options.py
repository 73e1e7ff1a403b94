"""Options shared by every source; each source adds its own and its ``type``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from t2i_align.data.label_rules import LabelByOptions
from t2i_align.options import Options
from t2i_align.registry import nearest

Ties = Literal["drop", "keep", "first"]
Pairing = Literal["best_worst", "adjacent", "all"]


class CurriculumOptions(Options):
    """``data.curriculum``: pairs from easy to hard; see ``order.py``."""

    chunks: int = Field(
        6,
        ge=1,
        description="equal parts of the pairs, largest difference of the values first; 6 in the "
        "released code",
    )
    passes_per_chunk: int = Field(
        1, ge=1, description="passes over the parts in use before the next one joins"
    )
    min_gap: float = Field(
        0.0,
        ge=0,
        description="pairs whose values differ by less are never used; 0.02 (text, human scores) "
        "and 0.2 (aesthetics) in Curriculum-DPO",
    )


class RecordOptions(Options):
    """What every source understands.

    Class attributes:
        known_columns: the names ``columns`` may rename.
    """

    known_columns: ClassVar[tuple[str, ...]] = ()

    proportion_empty_prompts: float = Field(
        0.0,
        ge=0,
        le=1,
        description="caption dropout: share of records trained with an empty prompt, drawn once a "
        "record; 0.2 in the released Diffusion-DPO code",
    )
    pairing: Pairing = Field(
        "best_worst",
        description="which pairs a ranking gives an objective over pairs: best against worst, "
        "neighbours, or all; equal ranks give none; pairs stay pairs",
    )
    max_records: int | None = Field(
        None, ge=1, description="stop after this many records; null for all"
    )
    shuffle_labels: bool = Field(
        False,
        description="control run: every record's label is drawn by a coin, so what is gained was "
        "not learned from preferences",
    )
    label_by: LabelByOptions | None = Field(
        None,
        description="labels of judges instead of the source's own; the source's samples are scored "
        "before training, once for each version of judges, weights and data",
    )
    curriculum: CurriculumOptions | None = Field(
        None,
        description="pairs from easy to hard by the difference of their values (of label_by, or "
        "of the source); null: all from the start, in random order",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="renames, ours: theirs, for files that name a column otherwise",
    )

    @model_validator(mode="after")
    def _columns_are_known(self) -> RecordOptions:
        for name in self.columns:
            if name not in self.known_columns:
                allowed = list(self.known_columns)
                hint = nearest(name, allowed)
                raise ValueError(
                    f"columns: '{name}' is not a column of this source; "
                    f"allowed: {', '.join(allowed)}" + (f"; {hint}" if hint else "")
                )
        return self


class FileOptions(RecordOptions):
    """Sources that read rows: parquet, jsonl or json files, or a data set of the hub."""

    path: str | list[str] | None = Field(
        None, description="file, folder or glob, or a list of them; ~ is the home folder"
    )
    hub_id: str | None = Field(
        None, description="data set of the Hugging Face hub, streamed (needs the hub extra)"
    )
    revision: str | None = Field(None, description="hub revision; pin it so that data cannot move")
    image_dir: str | None = Field(
        None,
        description="folder that files named by rows start from and lie in, links followed; null: "
        "the folder of the data file",
    )
    split: str = Field(
        "train",
        description="split of the hub data set; of a folder, the files named after it if any are",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> FileOptions:
        given = [n for n in ("path", "hub_id") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path and hub_id (got {' and '.join(given) or 'neither'})"
            )
        if self.revision is not None and self.hub_id is None:
            raise ValueError("revision belongs to hub_id; a path has none")
        return self
