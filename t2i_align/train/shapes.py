"""Which aspect buckets a recipe has, and where the first records of its data fall."""

from __future__ import annotations

from t2i_align.checks_buckets import bucketed
from t2i_align.data.buckets import buckets_of, variant_at
from t2i_align.data.prepare import bucket_counts
from t2i_align.recipe import Recipe

LOOKED = 100  # rows whose headers are read


def shapes(recipe: Recipe) -> dict[str, int | None]:
    """Every bucket with the records in it, of the first :data:`LOOKED` rows; {} without buckets.

    Counts are None where a look is not cheap: data of a hub, or that judges label first.

    Raises:
        ModelError: buckets that do not fit the network.
    """
    if not bucketed(recipe):
        return {}
    buckets = buckets_of(recipe.chosen("model")(recipe.model, "meta"))
    assert buckets is not None, "the generator of these options has them"
    source = recipe.chosen("data")(recipe.data)
    names = [variant_at(size, "") for size in buckets.sizes]
    if recipe.data.label_by is not None or source.count() is None:
        return dict.fromkeys(names)
    found = bucket_counts(source, recipe.needs.layout, recipe.data.pairing, buckets, LOOKED)
    return {name: found.get(name, 0) for name in names}


def shape_rows(found: dict[str, int | None]) -> list[tuple[str, str]]:
    """Label and value for a table."""
    if not found:
        return []
    if None in found.values():
        return [("buckets (height x width)", ", ".join(found))]
    text = ", ".join(f"{name}: {count}" for name, count in found.items())
    return [("buckets (height x width)", f"{text} of the first {LOOKED} rows' records")]
