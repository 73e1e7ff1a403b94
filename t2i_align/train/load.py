"""Loading a run's network: its reference and its recomputed blocks are as the run needs them."""

from __future__ import annotations

from typing import Any, cast

from t2i_align.generators.checkpointing import set_share
from t2i_align.protocols import Generator, Needs
from t2i_align.train.recompute import budget, told
from t2i_align.train.reference import load_mode
from t2i_align.train.setup import Setup
from t2i_align.train.trace import Device


def load_network(setup: Setup, generator: Generator, needs: Needs) -> None:
    """Load the network of a run, see :mod:`t2i_align.train.recompute` and ``reference``."""
    recipe = setup.recipe
    generator.load_module(
        recipe.seed,
        reference="reference" in needs.views,
        reference_mode=load_mode(recipe, needs),
    )
    if recipe.model.gradient_checkpointing == "auto":
        from t2i_align.train.plan import plan

        kind: Any = setup.accelerator.device.type
        found = plan(recipe, cast(Device, kind))
        assert found.recomputed is not None
        set_share(generator.module, found.recomputed)
        setup.say(told(found.recomputed, found.memory["peak"], budget(recipe)))
