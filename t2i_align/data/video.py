"""Opening clips that strangers made, and fitting them to a model's frames and shape.

A clip becomes its first ``num_frames`` consecutive frames. Every other rule (evenly spaced, random)
plays a long clip faster than it was filmed, and how things move is what clips are judged for.
Shorter clips are refused, since padding would be learned, unless the caller leaves it out of the
score (generators/clip_masks.py). A picture is a clip of one frame, and an animated GIF, WebP or PNG
is a clip too.

Opening is bounded: bytes, pixels a frame by the header, and no frame is decoded beyond those that
are used; frames are fitted one by one, so memory holds one of full size. Containers that name other
files or addresses (playlists) are not opened. The rotation phones write down is applied. All frames
get the transform of pictures (data/images.py) with one crop and one mirroring.
"""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from t2i_align import optional
from t2i_align.contract import Media, MediaError
from t2i_align.data.images import FORMATS, SizeInfo, bounded, fit, image_size, opened, to_rgb
from t2i_align.data.media import MAX_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    Frames = Generator[PILImage, None, None]

MAX_FRAME_PIXELS = 36_000_000  # 8K
ONLY = {"format_whitelist": "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg"}  # no playlists
CODECS = ("libx264", "mpeg4")  # of written clips, the first there is


def load_clip(
    data: bytes | str | Path,
    num_frames: int,
    size: int | tuple[int, int],
    crop: Literal["center", "random"],
    seed_key: str,
    flip: bool,
    *,
    whole: bool = True,
) -> tuple[Tensor, SizeInfo]:
    """A tensor of one shape from a clip of any.

    Args:
        data: a video file, an animated picture or a picture: its bytes or path.
        num_frames: F, how many of its first frames.
        size: (height, width) h, w, or the side of a square; this and the rest as of
            :func:`t2i_align.data.images.fit`.
        crop: as there.
        seed_key: as there.
        flip: as there.
        whole: refuse a clip of fewer frames, else all it has are given.

    Returns:
        Pixels ``(3, F, h, w)`` float32 in [-1, 1], and the size conditions.

    Raises:
        MediaError: not a clip, broken, too large, or of fewer than ``num_frames`` frames.
    """
    with closing(frames(data)) as stream:
        fitted = [fit(x, size, crop, seed_key, flip) for x in islice(stream, num_frames)]
    if not fitted or (whole and len(fitted) < num_frames):
        some = "1 frame" if len(fitted) == 1 else f"{len(fitted)} frames"
        raise MediaError(f"a clip of {some}; model.num_frames asks for {num_frames}")
    sizes = {info for _, info in fitted}
    if len(sizes) > 1:
        raise MediaError("its frames change size")
    return torch.stack([pixels for pixels, _ in fitted], dim=1), sizes.pop()


def true_size(media: Media) -> tuple[int, int]:
    """(height, width) of a resolved picture or of a clip's first frame, as it is shown.

    Raises:
        MediaError: as :func:`frames`.
    """
    if media.kind != "video":
        return image_size(media.data)
    with closing(frames(media.data)) as stream:
        first = next(stream, None)
    if first is None:
        raise MediaError("a clip without frames")
    return first.height, first.width


def frames(data: bytes | str | Path) -> Frames:
    """Frames of a clip in order, RGB, decoded as they are asked for.

    Raises:
        MediaError: empty, unreadable, of an unknown kind, or over :data:`MAX_BYTES` or
            :data:`MAX_FRAME_PIXELS`.
        MissingDependencyError: a video file, but the ``video`` extra is not installed.
    """
    data = bounded(data, MAX_BYTES)
    yield from (_of_picture(data) if _is_picture(data) else _of_video(data))


def _is_picture(data: bytes) -> bool:
    """Whether Pillow knows the format; what it says of a broken header is left to it."""
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # a broken header may raise anything inside a decoder
        return True
    return True


def _of_picture(data: bytes) -> Frames:
    from PIL import ImageOps

    image = opened(data)
    index = 0
    while True:
        try:
            image.seek(index)
            frame = to_rgb(ImageOps.exif_transpose(image))
        except EOFError:
            return
        except Exception as error:  # as above
            raise MediaError(f"cannot decode this {image.format} file: {error}") from error
        yield frame
        index += 1


def _of_video(data: bytes) -> Frames:
    optional.require("av", "video", "a video file")
    import av

    try:
        with av.open(io.BytesIO(data), "r", options=ONLY) as container:
            if not container.streams.video:
                raise MediaError("no video in this file")
            header = container.streams.video[0].codec_context
            _check_pixels(header.width, header.height)
            for frame in container.decode(video=0):
                _check_pixels(frame.width, frame.height)
                yield _turned(frame.to_image(), frame.rotation)
    except MediaError:
        raise
    except Exception as error:  # a broken file may raise anything inside a decoder
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"not a readable video (starts with {data[:8]!r}): {reason}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        limit = f"{MAX_FRAME_PIXELS / 1e6:.0f} megapixels"
        raise MediaError(f"frames of {width} x {height} pixels; the limit is {limit}")


def _turned(image: PILImage, degrees: int) -> PILImage:
    """The frame as it is shown: turned counterclockwise by a multiple of 90 degrees."""
    from PIL import Image

    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(degrees % 360)
    return image if turn is None else image.transpose(turn)


def save_clip(clip: Tensor, path: Path, rate: float) -> None:
    """Write an ``.mp4``.

    Args:
        clip: ``(3, f, h, w)`` in [0, 1]; an odd last row or column is left out, as the codec needs.
        path: of the file.
        rate: frames a second.

    Raises:
        MissingDependencyError: the ``video`` extra is not installed.
    """
    optional.require("av", "video", f"writing {path.name}")
    from fractions import Fraction

    import av

    height, width = (side // 2 * 2 for side in clip.shape[-2:])
    pixels = (clip[:, :, :height, :width].detach().float().clamp(0, 1) * 255).round().byte()
    with av.open(str(path), "w", format="mp4") as out:
        codec = next(name for name in CODECS if name in av.codecs_available)
        stream: Any = out.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for array in pixels.permute(1, 2, 3, 0).cpu().contiguous().numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        out.mux(stream.encode(None))
