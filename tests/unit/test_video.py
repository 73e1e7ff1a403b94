"""Opening hostile clips and fitting friendly ones; clips as data and as files."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align import optional
from t2i_align.contract import Media, MediaError
from t2i_align.data import video
from t2i_align.data.images import fit, open_image
from t2i_align.data.media import content_hash, resolve
from t2i_align.data.media_io import clip_grid, save_media
from t2i_align.data.trl import TRL, TRLOptions
from t2i_align.data.video import frames, load_clip, save_clip, true_size
from t2i_align.errors import MissingDependencyError
from tests.runs import jpeg, write_jsonl
from tests.tiny_video import moving, mp4

SIZE = (40, 56)  # height, width
FRAMES = moving(1, 7, SIZE)


def animated(arrays: list[np.ndarray], kind: str = "WEBP") -> bytes:
    """A lossless animation."""
    images, file = [Image.fromarray(a) for a in arrays], io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:], lossless=True, duration=40)
    return file.getvalue()


def fitted(arrays: list[np.ndarray], size: int, flip: bool = False) -> torch.Tensor:
    """Each frame as a picture of its own."""
    return torch.stack(
        [fit(Image.fromarray(a), size, "center", "k", flip)[0] for a in arrays], dim=1
    )


def distances(clip: torch.Tensor, arrays: list[np.ndarray], size: int) -> torch.Tensor:
    """Mean absolute difference of every decoded frame (row) to every source frame (column)."""
    return (clip.unsqueeze(2) - fitted(arrays, size).unsqueeze(1)).abs().mean((0, 3, 4))


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_a_clip_is_its_first_frames_in_order(container: str) -> None:
    """Of the 7 that were written, each of the 5 read is nearest to its own."""
    data = mp4(FRAMES, container=container)
    pixels, size = load_clip(data, 5, 32, "center", "k", False)
    assert pixels.shape == (3, 5, 32, 32) and pixels.dtype == torch.float32
    assert size.original_size == SIZE and size.target_size == (32, 32)
    far = distances(pixels, FRAMES, 32)
    assert far.argmin(1).tolist() == [0, 1, 2, 3, 4]
    assert far.diagonal().max() < 0.06 < 0.1 < far.sort(1).values[:, 1].min()  # lossy codecs


@pytest.mark.parametrize("flip", [False, True])
def test_every_frame_gets_the_transform_of_pictures(flip: bool) -> None:
    pixels, _ = load_clip(animated(FRAMES), 7, 24, "center", "k", flip)
    assert torch.equal(pixels, fitted(FRAMES, 24, flip))


def test_a_random_crop_is_one_for_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A still scene stays still."""
    still = [Image.fromarray(FRAMES[0])] * 3
    monkeypatch.setattr(video, "frames", lambda data: (x for x in still))
    corners = set()
    for key in "abcdef":
        pixels, size = load_clip(b"", 3, 24, "random", key, False)
        assert torch.equal(pixels, pixels[:, :1].expand_as(pixels))
        corners.add(size.crop_top_left)
    assert len(corners) > 1


def test_a_picture_is_a_clip_of_one_frame() -> None:
    data = jpeg(3, 40, 60)
    pixels, _ = load_clip(data, 1, (24, 32), "center", "k", False)
    expected, _ = fit(open_image(data), (24, 32), "center", "k", False)
    assert torch.equal(pixels[:, 0], expected)
    with pytest.raises(MediaError, match=r"a clip of 1 frame; model\.num_frames asks for 5"):
        load_clip(data, 5, 24, "center", "k", False)


def test_gif_frames_are_composed() -> None:
    """Frames that store only what changed come out whole."""
    base = np.zeros((16, 16, 3), np.uint8)
    arrays = []
    for i in range(3):
        base[4 * i : 4 * i + 4] = (255, 0, 0)
        arrays.append(base.copy())
    found = [np.asarray(x) for x in frames(animated(arrays, "GIF"))]
    assert len(found) == 3 and all((a == b).all() for a, b in zip(found, arrays, strict=True))


def test_no_frame_is_decoded_beyond_those_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(video, "_turned", lambda image, degrees: seen.append(degrees) or image)
    load_clip(mp4(FRAMES), 3, 24, "center", "k", False)
    assert len(seen) == 3


def test_short_clips_and_changing_sizes_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match=r"a clip of 7 frames; model\.num_frames asks for 9"):
        load_clip(mp4(FRAMES), 9, 24, "center", "k", False)
    sizes = [Image.new("RGB", (30, 30)), Image.new("RGB", (30, 40))]
    monkeypatch.setattr(video, "frames", lambda data: (x for x in sizes))
    with pytest.raises(MediaError, match="its frames change size"):
        load_clip(b"", 2, 24, "center", "k", False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"this is a text file", r"not a readable video \(starts with b'this is '\): Invalid"),
        (mp4(FRAMES)[:900], "not a readable video"),
        (animated(FRAMES, "GIF")[:1500], "cannot decode this GIF file"),
    ],
    ids=["empty", "text", "cut mp4", "cut gif"],
)
def test_broken_clips_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        list(frames(data))


def test_a_list_of_other_files_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg itself would follow it, which the test makes sure of."""
    import av

    (tmp_path / "secret.mp4").write_bytes(mp4(FRAMES))
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist), "r") as followed:
        assert len(list(followed.decode(video=0))) == 7
    with pytest.raises(MediaError, match="not a readable video"):
        next(frames(playlist))


def test_limits_hold_before_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video, "_turned", lambda image, degrees: pytest.fail("decoded"))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 2000)
    with pytest.raises(MediaError, match="frames of 56 x 40 pixels; the limit is 0 megapixels"):
        next(frames(mp4(FRAMES)))
    monkeypatch.setattr(video, "MAX_BYTES", 2**20)
    (tmp_path / "big.mp4").write_bytes(bytes(3 * 2**20))
    with pytest.raises(MediaError, match="the limit is 1 MiB"):
        next(frames(tmp_path / "big.mp4"))
    with pytest.raises(MediaError, match=r"cannot read .*gone\.mp4: No such file"):
        next(frames(tmp_path / "gone.mp4"))


ONE = 1 << 16
MATRICES: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "clockwise": ((0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30), lambda a: np.rot90(a, -1)),
    "half": ((-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30), lambda a: np.rot90(a, 2)),
    "counterclockwise": ((0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), lambda a: np.rot90(a)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_rotation_of_phones_is_applied(name: str) -> None:
    """The display matrix of the track header: (x, y) is shown at (a x + c y, b x + d y)."""
    matrix, turn = MATRICES[name]
    data = mp4(FRAMES)
    at = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[at : at + 36]) == (ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    data = data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :]
    shown = np.asarray(next(frames(data))).astype(int)
    plain = turn(np.asarray(next(frames(mp4(FRAMES)))).astype(int))
    assert shown.shape == plain.shape and (shown == plain).all()
    assert true_size(Media("video", data)) == plain.shape[:2]


def test_true_size_is_of_the_kind() -> None:
    assert true_size(Media("image", jpeg(1, 40, 60))) == (40, 60)
    assert true_size(Media("video", animated(FRAMES))) == SIZE


def test_without_the_extra_the_fix_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version_of", lambda dist: None)
    with pytest.raises(MissingDependencyError, match="a video file needs the package 'av'") as told:
        next(frames(mp4(FRAMES)))
    assert "t2i-align[video]" in str(told.value.fix)
    assert len(list(islice(frames(animated(FRAMES)), 3))) == 3  # Pillow's formats need none


def test_trl_rows_hold_clips_in_every_form(tmp_path: Path) -> None:
    data = mp4(FRAMES)
    (tmp_path / "a.mp4").write_bytes(data)
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "chosen": "a.mp4", "rejected": {"bytes": None, "path": "a.mp4"}},
        {"prompt": "p", "chosen": "a.mp4", "rejected": 3},
        {"prompt": "p", "chosen": "a.mp4", "rejected": "https://example.org/a.mp4"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = TRL(TRLOptions.model_validate({"path": str(path), "media": "video"}))
    (record,) = source
    media = [resolve(item.media) for item in record.items]
    assert [m.kind for m in media] == ["video", "video"] and media[0].data == data
    assert content_hash(media[0]) == content_hash(media[1]) != content_hash(Media("image", data))
    reasons = [reason for _, reason in source.stats.skipped]
    assert reasons[0] == "a video is bytes, {bytes, path} or a path, got int"
    assert "is a URL" in reasons[1]


def test_written_clips_come_back(tmp_path: Path) -> None:
    """Within the codec's loss; an odd side loses its last line, as the codec wants even ones."""
    clip = (fitted(FRAMES, 40)[:, :5, :39] + 1) / 2
    save_clip(clip, tmp_path / "a.mp4", 8.0)
    found = torch.stack(
        [torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in frames(tmp_path / "a.mp4")], 1
    )
    assert found.shape == (3, 5, 38, 40)
    assert (found / 255 - clip[:, :, :38]).abs().mean() < 0.05
    import av

    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 8


def test_a_sheet_of_clips_has_each_in_its_cell(tmp_path: Path) -> None:
    torch.manual_seed(0)
    media = [Media("video", torch.rand(3, 2, 8, 10), {"frame_rate": 8.0}) for _ in range(3)]
    sheet = clip_grid(media)
    assert sheet.shape == (3, 2, 16, 20)
    cells = [sheet[:, :, h : h + 8, w : w + 10] for h in (0, 8) for w in (0, 10)]
    assert all(torch.equal(cell, m.data) for cell, m in zip(cells[:3], media, strict=True))
    assert (cells[3] == 1).all()
    path = save_media(media, ["a", "b", "c"], tmp_path / "step")
    assert path.name == "step.mp4" and len(list(frames(path))) == 2
    assert (tmp_path / "step.json").read_text() == '["a", "b", "c"]'
