"""Opening hostile images and fitting friendly ones."""

import io
import struct
import zlib
from pathlib import Path

import pytest
import torch
from data_builders import image_bytes
from PIL import Image, ImageFile
from torchvision import transforms

from t2i_align.contract import MediaError
from t2i_align.data import images
from t2i_align.data.images import fit, open_image


def saved(image: Image.Image, kind: str = "PNG", exif: Image.Exif | None = None) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({} if exif is None else {"exif": exif}))
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (b"this is a text file", "not an image (starts with b'this is ')"),
        (image_bytes(0, (64, 64))[:900], "cannot decode this JPEG file: image file is truncated"),
        (bomb(9000, 9000), "9000 x 9000 pixels by its header; the limit is 64 megapixels"),
        (bomb(60000, 60000), "more than 64 megapixels by its header"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_broken_images_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        open_image(data)
    assert reason in str(caught.value)


def test_the_pixel_limit_holds_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="9000 x 9000"):
        open_image(bomb(9000, 9000))


def test_the_byte_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    (tmp_path / "big.jpg").write_bytes(bytes(3 * 2**20))
    with pytest.raises(MediaError, match="the limit is 1 MiB"):
        open_image(tmp_path / "big.jpg")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"cannot read .*gone\.jpg: No such file"):
        open_image(tmp_path / "gone.jpg")


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: show it turned by 90 degrees clockwise
    turned = open_image(saved(image, exif=exif))
    assert turned.size == (4, 8)
    assert turned.getpixel((3, 0)) == (255, 0, 0)


def test_transparency_becomes_white() -> None:
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half.putpixel((0, 0), (10, 20, 30, 255))
    image = open_image(saved(half))
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert image.getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palette_becomes_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=0)
    image = open_image(file.getvalue())
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (0, 200, 0)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    grey = Image.new("I;16", (1, 1), 0x8040)
    assert open_image(saved(grey)).getpixel((0, 0)) == (0x80, 0x80, 0x80)


@pytest.mark.parametrize("size", [(37, 52), (52, 37), (40, 40), (13, 91), (20, 32)])
def test_center_fit_is_torchvisions_transform(size: tuple[int, int]) -> None:
    image = open_image(image_bytes(3, size))
    theirs = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    pixels, info = fit(image, 32, "center", "", False)
    torch.testing.assert_close(pixels, theirs(image), atol=1e-6, rtol=0)
    assert info.original_size == (size[1], size[0])
    assert info.target_size == (32, 32)


def test_flip_mirrors_the_very_same_crop() -> None:
    image = open_image(image_bytes(5, (70, 40)))
    plain, at = fit(image, 32, "random", "key", False)
    mirrored, flipped_at = fit(image, 32, "random", "key", True)
    torch.testing.assert_close(mirrored, plain.flip(-1), atol=0, rtol=0)
    resized_width = 32 * 70 // 40
    assert flipped_at.crop_top_left[0] == at.crop_top_left[0]
    assert flipped_at.crop_top_left[1] == resized_width - (at.crop_top_left[1] + 32)


def test_random_crop_is_a_function_of_the_key_and_covers_the_image() -> None:
    image = open_image(image_bytes(5, (64, 32)))
    lefts = [fit(image, 32, "random", str(k), False)[1].crop_top_left[1] for k in range(300)]
    again = [fit(image, 32, "random", str(k), False)[1].crop_top_left[1] for k in range(300)]
    assert lefts == again
    assert set(lefts) == set(range(33))  # 64 - 32 free pixels, both ends included


def test_range_is_minus_one_to_one() -> None:
    white, _ = fit(Image.new("RGB", (4, 4), "white"), 4, "center", "", False)
    black, _ = fit(Image.new("RGB", (4, 4), "black"), 4, "center", "", False)
    assert white.unique().tolist() == [1.0] and black.unique().tolist() == [-1.0]


def test_a_sliver_is_refused_before_it_is_enlarged() -> None:
    """65,000 x 1 pixels pass the decoder's bound, but its short side would be blown up to r."""
    from PIL import Image as PILImage

    with pytest.raises(MediaError, match="too long"):
        fit(PILImage.new("RGB", (65000, 1)), 1024, "center", "k", False)


@pytest.mark.parametrize("size", [(37, 52), (52, 37), (40, 40), (13, 91), (20, 32), (48, 64)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (48, 64)])
def test_a_shape_is_covered_and_cropped_as_torchvision_would(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    """The exact ratio decides which side fits: the other is resized by the same, rounded down."""
    image = open_image(image_bytes(3, size))
    (width, height), (h, w) = size, shape
    tall = height * w >= width * h  # taller than the shape: the width fits
    covering = (height * w // width, w) if tall else (h, width * h // height)
    theirs = transforms.Compose(
        [
            transforms.Resize(covering, transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(shape),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    pixels, info = fit(image, shape, "center", "", False)
    assert pixels.shape == (3, *shape) and covering[0] >= h and covering[1] >= w
    torch.testing.assert_close(pixels, theirs(image), atol=1e-6, rtol=0)
    assert info.original_size == (height, width) and info.target_size == shape
    assert all(
        0 <= at <= free - side
        for at, free, side in zip(info.crop_top_left, covering, shape, strict=True)
    )


def test_a_square_as_a_pair_is_the_side_alone() -> None:
    image = open_image(image_bytes(4, (70, 40)))
    for crop in ("center", "random"):
        one, two = (fit(image, size, crop, "key", True) for size in (32, (32, 32)))
        assert torch.equal(one[0], two[0]) and one[1] == two[1]


def test_flip_mirrors_the_crop_of_a_shape() -> None:
    image = open_image(image_bytes(5, (90, 40)))
    plain, at = fit(image, (32, 48), "random", "key", False)
    mirrored, flipped_at = fit(image, (32, 48), "random", "key", True)
    torch.testing.assert_close(mirrored, plain.flip(-1), atol=0, rtol=0)
    assert flipped_at.crop_top_left[1] == 32 * 90 // 40 - (at.crop_top_left[1] + 48)


def test_the_size_is_read_within_the_same_bounds() -> None:
    for data, reason in ((b"", "empty file"), (b"text", "not an image")):
        with pytest.raises(MediaError, match=reason):
            images.image_size(data)
    with pytest.raises(MediaError, match="9000 x 9000"):
        images.image_size(bomb(9000, 9000))


def test_a_jpegs_size_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    file = image_bytes(0, (24, 16))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert images.image_size(file) == (16, 24)
    with pytest.raises(pytest.fail.Exception, match="decoded"):  # the trap is where decoding is
        Image.open(io.BytesIO(file)).load()
