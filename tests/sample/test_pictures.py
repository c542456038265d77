"""Pictures and clips in files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from priorguide.sample.pictures import gif, read_picture, to_pil, to_uint8, write_clip


def moving(channels=3, frames=6, height=16, width=24):
    """A bright bar that moves right over a dark ground."""
    clip = torch.full((channels, frames, height, width), 0.1)
    for frame in range(frames):
        clip[:, frame, :, 2 * frame : 2 * frame + 6] = 0.9
    return clip


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([255, 255, 0, 10, 20, 30])
        image.paste(0, (0, 0, 2, 4))
        image.save(tmp_path / "a.png", transparency=1)
        kept = (1.0, 1.0, 0.0)
    else:
        image = Image.new(mode, (4, 4), (0,) * len(mode))  # black, and not to be seen
        image.paste((50,) * (len(mode) - 1) + (255,), (0, 0, 2, 4))
        image.save(tmp_path / "a.png")
        kept = (50 / 255,) * 3
    pixels = read_picture(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 4) and (pixels[..., 2:] == 1).all()
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor(kept))


def test_pictures_are_read_upright_and_grey_stays_grey(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    image.save(tmp_path / "a.png", exif=(exif := Image.Exif()))
    assert torch.equal(read_picture(tmp_path / "a.png")[0], torch.from_numpy(np.asarray(image)).float() / 255)
    exif[0x0112] = 6  # turned by the camera: to be shown a quarter clockwise
    image.save(tmp_path / "b.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "b.png"), read_picture(tmp_path / "a.png").rot90(-1, (1, 2)))


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_holds_every_frame(channels):
    clip = moving(channels)
    with Image.open(io.BytesIO(gif([to_pil(frame) for frame in clip.unbind(1)], fps=8))) as found:
        lasting = []
        for frame in range(6):
            found.seek(frame)
            shown = np.asarray(found.convert("RGB")).astype(int)
            assert np.abs(shown - to_uint8(clip[:, frame].expand(3, -1, -1))).max() <= 2
            lasting.append(found.info["duration"])
        assert found.n_frames == 6 and found.info["loop"] == 0
    assert sum(lasting) == 750 and {*lasting} == {120, 130}  # hundredths of a second, 1/8 s on average


def test_gif_frames_last_two_hundredths_at_least():
    with Image.open(io.BytesIO(gif([to_pil(frame) for frame in moving().unbind(1)], fps=200))) as found:
        assert found.info["duration"] == 20


def test_a_clip_is_written_as_gif_and_mp4(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    clip = moving(height=15, width=23)  # odd: H.264 has no such pictures
    write_clip(tmp_path / "0000.a", clip, fps=12.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.a.gif", "0000.a.mp4"]
    with av.open(str(tmp_path / "0000.a.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        stream = file.streams.video[0]
        assert (float(stream.average_rate), stream.codec_context.name, stream.pix_fmt) == (12.5, "h264", "yuv420p")
    assert len(frames) == 6 and frames[0].shape == (16, 24, 3)
    for frame, shown in enumerate(frames):
        assert np.abs(shown[:15, :23].astype(int) - to_uint8(clip[:, frame])).mean() < 6
    monkeypatch.setattr("priorguide.sample.pictures.find_spec", lambda name: None)
    write_clip(tmp_path / "b", clip)
    assert not (tmp_path / "b.mp4").exists() and (tmp_path / "b.gif").exists()
