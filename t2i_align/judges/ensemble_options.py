"""Members of an ensemble, its rule, and who watches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from t2i_align.options import Options


class Member(Options):
    """One judge of an ensemble."""

    judge: str = Field(description="name of its card")
    weight: float = Field(1.0, ge=0, description="share of its vote; 0: it only guards a gate")
    mean: float | None = Field(None, description="on the reference data, frozen here")
    std: float | None = Field(None, gt=0, description="on the reference data, frozen here")
    direction: Literal[1, -1] | None = Field(
        None, description="1: higher is better; null: as the judge's card says"
    )
    gate: float | None = Field(
        None, description="worse than this, in the judge's own unit, makes a product 0"
    )


class EnsembleOptions(Options):
    """Members, rule, and who watches."""

    rule: Literal["z_score", "rank", "product", "quantile"] = Field(
        "z_score", description="see t2i_align/judges/ensemble_rules.py"
    )
    members: tuple[Member, ...] = Field(min_length=2, strict=False, description="the judges")
    held_out: tuple[str, ...] = Field(
        min_length=1, strict=False, description="judges that are reported and never members"
    )
    std_floor: float = Field(1e-3, gt=0, description="f of Eq. (1), in each judge's own unit")
    quantile: float = Field(0.0, ge=0, le=0.5, description="of rule quantile; 0: the minimum")

    @model_validator(mode="after")
    def _consistent(self) -> EnsembleOptions:
        names = [m.judge for m in self.members]
        every = [*names, *self.held_out]
        twice = sorted({name for name in every if every.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: named twice; a held-out judge is not a member")
        if not any(m.weight for m in self.members):
            raise ValueError("every weight is 0, so nothing is scored")
        bare = [m.judge for m in self.members if m.weight and None in (m.mean, m.std)]
        if bare and self.rule != "rank":
            raise ValueError(f"rule {self.rule} needs mean and std of {', '.join(bare)}")
        gated = [m.judge for m in self.members if m.gate is not None]
        if gated and self.rule != "product":
            raise ValueError(f"gates ({', '.join(gated)}) go with rule product, not {self.rule}")
        idle = [m.judge for m in self.members if not m.weight and m.gate is None]
        if idle:
            raise ValueError(f"{', '.join(idle)}: weight 0 and no gate; hold it out instead")
        return self
