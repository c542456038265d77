"""Decoding and fitting to a square."""

import numpy as np
import pytest
import torch
from PIL import Image

from priorguide.data.images import UNREADABLE, decode, fit


def test_pads_small_grey_pictures_and_resizes_others():
    small = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    padded = fit(small, 32, pad=True)
    assert padded.shape == (3, 1, 32, 32) and torch.equal(padded[..., 2:-2, 2:-2], small)
    assert padded.sum() == small.sum()
    for side, pad in ((28, False), (27, True), (20, True), (64, True)):
        flat = torch.full((1, 1, side, side), 200, dtype=torch.uint8)
        assert (fit(flat, 32, pad=pad) == 200).all(), "resized, not padded"
    assert fit(small, 28, pad=True) is small


def test_keeps_the_centre_of_the_longer_side():
    wide = torch.zeros(1, 3, 40, 100, dtype=torch.uint8)
    wide[..., 30:70] = 255
    assert (fit(wide, 20, pad=False)[..., 1:-1] == 255).all()
    assert (fit(wide.mT, 20, pad=False)[..., 1:-1, :] == 255).all()
    assert fit(torch.zeros(1, 1, 33, 50, dtype=torch.uint8), 16, pad=True).shape == (1, 1, 16, 16)


def test_the_square_is_cut_out_where_asked():
    ramp = torch.arange(100, dtype=torch.uint8).expand(1, 1, 40, 100)
    for across, first in ((0.0, 0), (0.5, 30), (0.999, 60)):
        assert torch.equal(fit(ramp, 40, pad=False, place=(0.7, across)), ramp[..., first : first + 40])
        assert torch.equal(fit(ramp.mT, 40, pad=False, place=(across, 0.7)), ramp.mT[..., first : first + 40, :])


def test_long_strips_are_refused_before_they_are_resized(tmp_path):
    assert fit(torch.zeros(1, 1, 2, 100, dtype=torch.uint8), 8, pad=False).shape == (1, 1, 8, 8)
    with pytest.raises(UNREADABLE, match=r"at most, got 1 x 60000 \(height x width\)"):
        decode(save(tmp_path / "strip.png", Image.new("RGB", (60_000, 1))), 256, 3)


def test_resizing_is_antialiased():
    checks = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = 255
    assert (fit(checks, 16, pad=False)[..., 2:-2, 2:-2].int() - 127).abs().max() < 8


def save(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path, mode, channels):
    if mode == "I;16":
        picture = Image.fromarray(np.full((40, 40), 39_321, np.uint16))
    else:
        picture = Image.new("RGB", (40, 40), (153, 153, 153)).convert(mode)
    path = save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), picture)
    pixels = decode(path, 32, channels)
    assert pixels.shape == (channels, 32, 32) and pixels.dtype == torch.uint8
    if mode != "1":
        assert (pixels.int() - 153).abs().max() <= 4


def test_colour_and_transparency(tmp_path):
    palette = Image.new("RGB", (32, 32), (200, 10, 30)).quantize(4)
    assert decode(save(tmp_path / "palette.png", palette), 32, 3)[:, 0, 0].tolist() == [200, 10, 30]
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    found = decode(save(tmp_path / "cmyk.jpg", cmyk, quality=95), 32, 3)[:, 0, 0]
    assert found[0] > 240 and found[1:].max() < 15
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert (decode(save(tmp_path / "clear.png", clear), 32, 3) == 255).all(), "transparency lies on white"
    gif = save(tmp_path / "clear.gif", Image.new("P", (32, 32), 3), transparency=3)
    assert (decode(gif, 32, 3) == 255).all()


def test_upright_by_exif(tmp_path):
    picture = Image.new("L", (32, 32), 0)
    picture.paste(255, (0, 0, 32, 16))  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    pixels = decode(save(tmp_path / "x.jpg", picture, exif=exif), 32, 1)
    assert pixels[0, :12].max() < 20 and pixels[0, 20:].min() > 235


def test_rows_of_datasets(tmp_path):
    path = save(tmp_path / "x.png", Image.new("L", (28, 28), 9))
    for cell in ({"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}):
        assert decode(cell, 32, 1)[0, 16, 16] == 9


def test_broken_files(tmp_path):
    whole = save(tmp_path / "x.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    content = whole.read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("short", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UNREADABLE):
            decode(tmp_path / name, 32, 3)
    for source in (tmp_path / "absent", None, {"bytes": None, "path": None}):
        with pytest.raises(UNREADABLE):
            decode(source, 32, 3)
