"""Cases of the video families: Wan 2.1 and 2.2 5B, LTX, CogVideoX 2B, 5B and 1.5."""

from __future__ import annotations

from tests.backbones import Case
from tests.tiny_video import cogvideox, cogvideox_5b, cogvideox_15, ltx, ltx_timed, wan, wan_5b

TEXT = {"max_sequence_length": 32}
WORDS = {"max_sequence_length": 24}  # as max_text_seq_length of the tiny transformer
CLIP = {"resolution": 32, "num_frames": 5}
SLOW = {"frame_rate": 12.5}
CASES: tuple[Case, ...] = (
    Case("wan", wan, {**CLIP, **TEXT}, (32, 48), 5.0, TEXT),
    Case("wan_2_2_5b", wan_5b, {**CLIP, **TEXT}, (32, 64), 5.0, TEXT),
    Case("ltx", ltx, {**CLIP, **TEXT, **SLOW}, (32, 64), 3.0, TEXT | SLOW),
    Case("ltx_timed", ltx_timed, {**CLIP, **TEXT}, (32, 64), 3.0, TEXT),
    Case("cogvideox_2b", cogvideox, {**CLIP, **WORDS}, (32, 48), 6.0, WORDS),
    Case("cogvideox_5b", cogvideox_5b, {**CLIP, **WORDS}, (32, 48), 6.0, WORDS),
    Case("cogvideox_1_5", cogvideox_15, {**CLIP, **WORDS}, (32, 48), 6.0, WORDS),
)
