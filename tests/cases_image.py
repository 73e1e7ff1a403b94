"""Cases of the UNet families, SD3, PixArt, Sana, Lumina 2 and CogView4."""

from __future__ import annotations

from functools import partial

from tests import tiny_image as tiny
from tests.backbones import Case

SQUARE = {"resolution": 64}
ODD = (64, 96)
TEXT = {"max_sequence_length": 32}
SYSTEM = {"max_sequence_length": 256}  # its system prompt comes before the prompt
# PixArt and Sana round sizes to a table unless told not to
PLAIN = {"use_resolution_binning": False, "clean_caption": False, **TEXT}
LAST_TEXT = ("transformer_blocks.1.attn.add_q_proj",)  # of SD3's last block, which drops its text

CASES: tuple[Case, ...] = (
    Case("sd", tiny.sd, SQUARE, ODD),
    Case("sd2", tiny.sd2, SQUARE, ODD),
    Case("sdxl", tiny.sdxl, SQUARE, ODD),
    Case("sd3", tiny.sd3, SQUARE, ODD, idle=LAST_TEXT),
    Case("sd35", tiny.sd35, SQUARE | TEXT, ODD, call=TEXT, idle=LAST_TEXT),
    Case("pixart_alpha", tiny.pixart, SQUARE | TEXT, ODD, call=PLAIN),
    Case("pixart_sized", partial(tiny.pixart, sized=True), SQUARE | TEXT, ODD, call=PLAIN),
    Case("pixart_sigma", partial(tiny.pixart, sigma=True), SQUARE | TEXT, ODD, call=PLAIN),
    Case("sana", tiny.sana, {"resolution": 128, **TEXT}, (128, 192), call=PLAIN),
    Case("lumina2", tiny.lumina2, SQUARE | SYSTEM, ODD, call=SYSTEM),
    Case("cogview4", tiny.cogview4, SQUARE, ODD),
)
