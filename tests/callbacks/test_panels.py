import numpy as np
import pytest
import torch

from priorguide.callbacks.panels import GAP, READABLE, grid, panel


def flat(*values: float) -> torch.Tensor:
    """Grey pictures (N, 1, 2, 3), each of one value."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 3)


def test_pictures_stand_where_the_grid_says():
    values = [[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]
    rows = torch.tensor(values).reshape(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 5)
    image = np.asarray(grid(rows, zoom=2))
    assert image.shape == (GAP + 2 * (8 + GAP), GAP + 3 * (10 + GAP), 3)
    mask = np.ones(image.shape[:2], bool)
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            y, x = GAP + r * (8 + GAP), GAP + c * (10 + GAP)
            assert (image[y : y + 8, x : x + 10] == round(255 * value)).all()
            mask[y : y + 8, x : x + 10] = False
    assert (image[mask] == 255).all()


def test_zoom_repeats_pixels_unblurred():
    pixels = torch.rand(1, 1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    image = np.asarray(grid(pixels, zoom=3))[GAP:-GAP, GAP:-GAP]
    expected = (pixels[0, 0] * 255).round().byte().permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(image, expected)


def test_small_pictures_are_enlarged_and_large_ones_left():
    assert grid(torch.zeros(1, 1, 1, 28, 28)).width - 2 * GAP >= READABLE
    assert grid(torch.zeros(1, 1, 3, 128, 128)).size == (128 + 2 * GAP, 128 + 2 * GAP)


def test_titles_shift_the_pictures_and_are_drawn():
    rows = torch.zeros(2, 2, 1, 96, 96)
    bare = grid(rows)
    titled = grid(rows, ["ankle boot", "coat"], ["self, scale 2", "base, scale 3"])
    left, top = titled.width - bare.width, titled.height - bare.height
    assert left > 0 and top > 0
    image = np.asarray(titled)
    np.testing.assert_array_equal(image[top:, left:], np.asarray(bare))
    for r in range(2):  # each row's title lies beside it, each column's above it
        y, x = top + GAP + r * (96 + GAP), left + GAP + r * (96 + GAP)
        assert (image[y : y + 96, :left] < 128).any()
        assert (image[:top, x : x + 96] < 128).any()


def test_long_titles_wrap_within_their_column():
    rows = torch.ones(1, 2, 1, 96, 96)
    short = grid(rows, column_titles=["a", "b"])
    long = grid(rows, column_titles=["an earlier checkpoint, scale 3", "unpronounceablylongwordwithoutanyspace"])
    assert long.width == short.width and long.height > short.height
    ink = np.asarray(long.convert("L")) < 128
    assert not ink[:, GAP + 96 : GAP + 96 + GAP].any()


def test_wrong_titles_are_refused():
    with pytest.raises(ValueError, match="row_titles must be 2 texts, got 1"):
        grid(torch.zeros(2, 1, 1, 8, 8), ["a"])
    with pytest.raises(ValueError, match="column_titles must be 1 texts, got 2"):
        grid(torch.zeros(2, 1, 1, 8, 8), (), ["a", "b"])


def test_panel_aligns_condition_candidates_and_target_by_row():
    pictures = {"self": flat(0.2, 0.3), "base": flat(0.4, 0.5)}
    image = np.asarray(panel(flat(0.0, 0.1), pictures, flat(0.6, 0.7), zoom=8))
    top = image.shape[0] - 2 * (16 + GAP)
    for r, row in enumerate([[0.0, 0.2, 0.4, 0.6], [0.1, 0.3, 0.5, 0.7]]):
        for c, value in enumerate(row):
            y, x = top + r * (16 + GAP), GAP + c * (24 + GAP)
            assert (image[y : y + 16, x : x + 24] == round(255 * value)).all()


def test_panel_leaves_out_what_is_missing_and_mixes_grey_with_colour():
    image = panel(None, {"self": torch.rand(2, 3, 8, 8), "base": torch.rand(2, 1, 8, 8)}, None, zoom=12)
    assert image.width == GAP + 2 * (96 + GAP)
    assert panel(torch.rand(2, 1, 16, 16), {"self": torch.rand(2, 3, 8, 8)}, zoom=12).width == image.width


def test_panel_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"target must be pictures of shape \(2, 1 or 3, H, W\), got \(3, 1, 2, 3\)"):
        panel(None, {"self": flat(0, 0)}, flat(0, 0, 0))
    with pytest.raises(ValueError, match="self must be pictures"):
        panel(None, {"self": torch.zeros(2, 4, 8, 8)})
    with pytest.raises(ValueError, match="at least one candidate"):
        panel(flat(0), {}, flat(0))
