"""One frame of a video, by its index (PyAV)."""

import io
from collections.abc import Iterator

from PIL import Image

# what FFmpeg may open: not SDP, which waits for a network, and not lists of other files
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,gif,png_pipe,jpeg_pipe,webp_pipe"


def decoded_frames(data: bytes) -> Iterator:
    """The frames of the first video stream, in order of presentation. ValueError when there is none to decode."""
    try:
        import av  # here, since only rows of type "video" need it
    except ImportError as error:
        raise ValueError("reading a video needs PyAV: pip install av") from error

    try:
        with av.open(io.BytesIO(data), options={"format_whitelist": FORMATS}) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            yield from container.decode(video=0)
    except av.FFmpegError as error:
        raise ValueError(f"no video that can be decoded: {error}") from error


def check_video(data: bytes, decode: bool, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the first frame, and with `decode` a look at all of them; ValueError with the reason when the
    bytes are no good video. What check_image is for pictures."""
    size = None
    for frame in decoded_frames(data):
        if frame.rotation:
            raise ValueError(f"stored rotated by {frame.rotation} degrees; encode it again, upright")
        if frame.width * frame.height > max_pixels:
            raise ValueError(f"frames of {frame.width} x {frame.height}, over {max_pixels} pixels")
        if size not in (None, (frame.width, frame.height)):
            raise ValueError(f"frames of {size} and of {(frame.width, frame.height)}; expected one size")
        size = frame.width, frame.height
        if not decode:
            break
    if size is None:
        raise ValueError("no frames")
    return size


def count_frames(data: bytes) -> int:
    return sum(1 for _ in decoded_frames(data))


def read_frame(data: bytes, index: int) -> Image.Image:
    """RGB frame `index`, from 0. IndexError when there are not so many."""
    for number, frame in enumerate(decoded_frames(data)):
        if number == index:
            return frame.to_image()
    raise IndexError(f"frame {index} of {number + 1}")
