"""common/data/images.py: whatever a file holds, the pixels that a person sees; resizing and cropping."""

import io

import numpy as np
import pytest
import torch
from data_files import png
from PIL import Image

from common.data import images


def decode(content: bytes, **options) -> np.ndarray:
    image = images.decode_image(content, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind, orientation):
    """Catches pictures trained on their sides, and a size that is not that of the decoded picture."""
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 16))  # red at the top left
    stored_by = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # 6 is stored turned to the left
    stored = upright if stored_by is None else upright.transpose(Image.Transpose(stored_by))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    pixels = decode(buffer.getvalue()).astype(int)
    assert pixels.shape == (32, 64, 3)
    assert abs(pixels - np.asarray(upright).astype(int)).max() < (1 if kind in ("PNG", "TIFF") else 90)
    assert abs(pixels[4, 4] - (255, 0, 0)).max() < 9 and pixels[-4, -4].min() > 246 and pixels[-4, 4].min() > 246
    for decoded in (True, False):  # the size from the header alone is the size of the decoded image
        assert images.check_image(buffer.getvalue(), decoded, 10**6) == (64, 32)


def test_transparency_goes_over_white():
    """Catches black where a picture is transparent, in every mode that can be."""
    assert decode(png((255, 0, 0, 0), mode="RGBA"))[0, 0].tolist() == [255, 255, 255]
    assert decode(png((255, 0, 0, 255), mode="RGBA"))[0, 0].tolist() == [255, 0, 0]
    assert abs(decode(png((0, 0, 0, 128), mode="RGBA"))[0, 0].astype(int) - 127).max() <= 1
    assert decode(png((0, 0), mode="LA"))[0, 0].tolist() == [255, 255, 255]
    assert decode(png((255, 0, 0), transparency=(255, 0, 0)))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    pixels = decode(buffer.getvalue())
    assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[1, 1].tolist() == [255, 255, 255]


def test_other_modes():
    """Catches 16-bit pictures cut to black or white, inverted CMYK, and floats read as they come."""
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 to 65535
    for mode in ("I;16", "I"):
        buffer = io.BytesIO()
        Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32)).save(
            buffer, "PNG" if mode == "I;16" else "TIFF"
        )
        assert Image.open(buffer).mode == mode
        assert decode(buffer.getvalue())[..., 1].ravel().tolist() == list(range(256))
    cmyk = decode(png((0, 255, 255, 0), mode="CMYK", kind="JPEG"))[5, 5].astype(int)
    assert abs(cmyk - (255, 0, 0)).max() < 10
    assert decode(png(77, mode="L"))[0, 0].tolist() == [77, 77, 77]
    assert decode(png(1, mode="1"))[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="32-bit float"):
        decode(png(0.5, mode="F", kind="TIFF"))


def test_resize_and_crop_order_of_sides():
    """Catches width and height exchanged, a crop that is not centred, pixels not in [-1, 1]."""
    image = Image.new("RGB", (100, 60), "white")
    image.paste("red", (0, 0, 20, 60))
    image.paste("blue", (80, 0, 100, 60))
    result = images.resize_and_crop(image, (32, 64))  # (width, height): both coloured ends are cut off
    assert result.size == (32, 64) and np.asarray(result).min() > 250
    tensor = images.image_to_tensor(images.resize_and_crop(image, (96, 32)))
    assert tensor.shape == (3, 32, 96) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 16, 2].tolist() == pytest.approx([1, -1, -1], abs=0.02)
    assert tensor[:, 16, -2].tolist() == pytest.approx([-1, -1, 1], abs=0.02)
    assert images.image_to_tensor(Image.new("RGB", (1, 1), (0, 255, 51))).flatten().tolist() == pytest.approx(
        [-1, 1, -0.6]
    )
    for size in ((997, 31), (31, 997), (1, 1), (333, 333)):  # no rounding outside the picture
        for target in ((64, 64), (96, 32), (32, 1024)):
            assert images.resize_and_crop(Image.new("RGB", size), target).size == target
    assert images.cover_box((100, 60), (32, 64)) == (35, 0, 65, 60)


def test_resizing_is_antialiased_and_draft_changes_little():
    """Catches aliasing, and a fast decoding that gives another picture."""
    y, x = np.mgrid[0:2048, 0:2048]
    smooth = np.stack([127 + 120 * np.sin(x / 97), 127 + 120 * np.cos(y / 61), (x + y) / 16], -1).astype(np.uint8)
    checks = np.where((x + y) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    assert abs(np.asarray(images.resize_and_crop(Image.fromarray(checks), (128, 128))).astype(int) - 127).max() < 9
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    full, fast = (images.decode_image(buffer.getvalue(), at_least=size) for size in (None, (256, 256)))
    assert full.size == (2048, 2048) and fast.size == (512, 512)
    a, b = (np.asarray(images.resize_and_crop(image, (256, 256))).astype(int) for image in (full, fast))
    assert abs(a - b).max() <= 4


def test_a_loss_mask_is_what_each_latent_sees():
    """Catches a mask with width and height exchanged, of the wrong end of grey, or that forgets a thin line."""
    mask = Image.new("RGB", (64, 32), "white")
    mask.paste("black", (0, 0, 16, 32))
    mask.paste("black", (16, 0, 18, 32))  # a quarter of a latent's eight pixels
    weights = images.loss_mask(mask, torch.zeros(16, 1, 4, 8))
    assert weights.shape == (1, 1, 4, 8) and weights.dtype == torch.float32
    torch.testing.assert_close(weights[0, 0], torch.tensor([0, 0, 0.75, 1, 1, 1, 1, 1]).expand(4, 8))
    assert (
        images.loss_mask(Image.new("L", (64, 32), 51), torch.zeros(128, 2, 4)).flatten().tolist()
        == [pytest.approx(0.2, abs=1e-5)] * 8
    )
