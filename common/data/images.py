"""Images: bytes to RGB pixels whatever the file holds, the check of one image, resizing and cropping.

Sizes are PIL's (width, height); image tensors are (3, H, W), or (4, H, W) where transparency is kept.
"""

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

PNG_ROTATION_MARKS = (b"eXIf", b"Raw profile", b"com.adobe.xmp")
# what Pillow may open: not EPS, for one, which runs another program
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
TURN = Image.Transpose
ROTATIONS = {  # EXIF orientation -> what undoes it
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE, 6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8. A PNG is asked only when it can have one: Pillow decodes all of it to find out."""
    if image.format == "PNG" and not any(mark in data for mark in PNG_ROTATION_MARKS):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block leaves the picture as it is stored
        return 1
    return value if value in ROTATIONS else 1


def _to_rgb(image: Image.Image, keep_alpha: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: "I", "I;16", "I;16B"
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range; save the image as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if keep_alpha:
            return image
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(data: bytes, at_least: tuple[int, int] | None = None, keep_alpha: bool = False) -> Image.Image:
    """RGB image: EXIF rotation applied, transparency over white, 16-bit scaled to 8, CMYK, palette, grey converted.

    at_least: the (width, height) that it will be shrunk to. A JPEG far larger than twice that is decoded at a half, a
    quarter or an eighth, several times faster; the resampling still sees two pixels for each that it makes.
    keep_alpha: a picture with transparency becomes RGBA.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if at_least is not None:
        image.draft(None, (2 * max(at_least), 2 * max(at_least)))  # a square, since the rotation is not known yet
    image.load()
    turn = ROTATIONS.get(_orientation(image, data))
    image = _to_rgb(image, keep_alpha)
    return image if turn is None else image.transpose(turn)


def check_image(data: bytes, decode: bool, max_pixels: int) -> tuple[int, int]:
    """(width, height) after EXIF rotation; ValueError with the reason when the bytes are no good image."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}, over {max_pixels} pixels")
        if decode or image.format == "TIFF":  # whether a TIFF's size is rotated already depends on Pillow's version
            return decode_image(data).size
        return image.size if _orientation(image, data) < 5 else image.size[::-1]
    except Image.DecompressionBombError as error:
        raise ValueError(f"a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        cut = not data or data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8"))
        raise ValueError(f"truncated: only {len(data)} bytes" if cut else "not an image") from error
    except Exception as error:  # for damaged files Pillow's plugins raise many kinds
        raise ValueError(f"truncated or damaged: {error}") from error


def cover_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels: the largest centred part of `size` with the aspect of `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = min(size[0], target[0] / scale), min(size[1], target[1] / scale)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at size (width, height): scaled to cover it, cut at the centre, antialiased."""
    if image.size == tuple(size):
        return image
    return image.resize(size, Image.Resampling.LANCZOS, box=cover_box(image.size, size), reducing_gap=3.0)


def loss_mask(image: Image.Image, latents: torch.Tensor) -> torch.Tensor:
    """float32 (1, ..., h, w) in [0, 1] for latents (..., h, w): how white the part of an image that each latent stands
    for is on average."""
    grey = torch.from_numpy(np.asarray(image.convert("L"), np.float32) / 255)  # (H, W)
    size = latents.shape[-2:]
    return torch.nn.functional.adaptive_avg_pool2d(grey[None], size).view(*[1] * (latents.ndim - 2), *size)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """float32 (3, H, W) in [-1, 1] from an RGB image, (4, H, W) from RGBA."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3 or 4) uint8
    return pixels.permute(2, 0, 1).contiguous().float().mul_(2 / 255).sub_(1)
