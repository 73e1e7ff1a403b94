"""Objectives.

One paper a file. The table maps recipe names to classes; adding one is a line here.
"""

OBJECTIVES: dict[str, str] = {
    "dpo": "t2i_align.objectives.dpo:DPO",
    "sft": "t2i_align.objectives.sft:SFT",
}
