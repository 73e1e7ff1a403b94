"""PartiPrompts (Yu et al. 2022, arXiv:2206.10789): 1,632 prompts, 12 categories, 11 challenges.

It has no metric of its own: people compared models side by side. Here a judge gives each picture a
number; reported are its mean by category, by challenge and over all pictures, and the share of
prompts on which one model beats another. The file's quotation marks belong to the prompts (read as
CSV, 22 of them lose theirs), and so do the spaces at the ends of ten.
"""

from __future__ import annotations

from typing import ClassVar

from t2i_align.evaluate.benchmark import Item
from t2i_align.evaluate.benchmarks.judged import Judged, read_table

COLUMNS = ("Prompt", "Category", "Challenge", "Note")


class PartiPrompts(Judged):
    """PartiPrompts under a judge."""

    name: ClassVar[str] = "parti_prompts"
    tables: ClassVar[tuple[str, ...]] = ("challenge",)

    def read_items(self) -> list[Item]:
        """A row an item, numbered from 0."""
        return [
            Item(
                f"{k:05d}",
                row["Prompt"],
                row["Category"].strip(),
                {"challenge": row["Challenge"].strip(), "note": row["Note"].strip()},
            )
            for k, row in enumerate(read_table(self.prompts, COLUMNS))
        ]
