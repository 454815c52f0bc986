"""Files named as videos that are something else."""

import io

import pytest
from helpers import ROOT, load_script

SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
LIST = b"ffconcat version 1.0\nfile '/etc/hostname'\n"


@pytest.fixture(scope="module")
def video():
    return load_script(ROOT / "recipes/qwenimage_edit/video.py")


@pytest.mark.parametrize("data", [SDP, LIST, b"", b"\0" * 5000], ids=["sdp", "list", "nothing", "zeros"])
def test_only_containers_are_opened(data, video):
    """Catches a text that makes the decoder wait for a network, or read a file outside the data's folder."""
    with pytest.raises(ValueError, match="no video that can be decoded"):
        video.check_video(data, decode=True, max_pixels=10**6)


def test_a_real_container_is_opened(video):
    import av
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 32, 3), np.uint8))))
        out.mux(stream.encode())
    assert video.check_video(buffer.getvalue(), decode=True, max_pixels=10**6) == (32, 16)
    assert video.count_frames(buffer.getvalue()) == 3
