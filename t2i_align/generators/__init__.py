"""Generators.

Trainable model families behind one protocol (:class:`t2i_align.contract.Generator`).
"""

GENERATORS: dict[str, str] = {
    "diffusers": "t2i_align.generators.diffusers_family:DiffusersGenerator",
    "token_lm": "t2i_align.generators.token_lm:TokenLM",
    "voxel_flow": "t2i_align.generators.voxel_flow:VoxelFlow",
}
