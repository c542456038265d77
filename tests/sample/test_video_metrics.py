"""Temporal metrics on clips whose motion is known."""

import pytest
import torch
from torch import nn

from priorguide.sample.feature_networks import frame_features
from priorguide.sample.video_metrics import temporal


def square(right, down=0.0, side=64, width=16.0, frames=6):
    """A bright square (1, 3, F, side, side) that moves so many pixels each frame; its edges are exact in area."""
    places = torch.arange(side)

    def cover(start):
        return (places + 1 - start).clamp(0, 1) * (start + width - places).clamp(0, 1)

    shown = [cover(side / 4 + down * f)[:, None] * cover(side / 6 + right * f) for f in range(frames)]
    return (0.2 + 0.6 * torch.stack(shown)).expand(1, 3, -1, -1, -1)


def degree(clip):
    return temporal(clip)["dynamic_degree"].item()


def test_a_clip_that_stands_still_is_perfectly_consistent():
    noise = torch.rand(2, 3, 1, 32, 48, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 5, -1, -1)
    found = temporal(noise)
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(
        ("consistency", "flicker", "dynamic_degree"), (2,)
    )
    assert all(values.dtype == torch.float32 for values in found.values())
    torch.testing.assert_close(found["consistency"], torch.ones(2))
    assert (found["flicker"] == 0).all() and (found["dynamic_degree"] == 0).all()


@pytest.mark.parametrize("speed", [1, 2, 3, 4, 6])
def test_the_dynamic_degree_is_the_speed(speed):
    for right, down in ((speed, 0), (-speed / 2, 0), (0, speed), (speed * 0.6, speed * 0.8)):
        known = (right**2 + down**2) ** 0.5 / 64
        assert degree(square(right, down)) == pytest.approx(known, rel=0.25, abs=0.4 / 64)


def test_the_dynamic_degree_does_not_depend_on_the_resolution():
    small, large = square(2), square(8, side=256, width=64.0)
    assert degree(large) == pytest.approx(degree(small), rel=0.1)


def test_brightness_that_changes_is_flicker_and_no_motion():
    still = square(0)
    blinking = still + torch.tensor([0.0, 0.1] * 3).reshape(1, 1, 6, 1, 1)
    found = temporal(blinking)
    torch.testing.assert_close(found["flicker"], torch.tensor([0.1]))
    assert found["dynamic_degree"].item() < 0.1 / 64


def test_each_clip_has_its_own_numbers():
    clips = torch.cat([square(0), square(3), square(0) + 0.1 * torch.tensor([0, 1.0] * 3).reshape(1, 1, 6, 1, 1)])
    together = temporal(clips)
    for i, clip in enumerate(clips):
        alone = temporal(clip[None])
        assert all(torch.equal(alone[name][0], together[name][i]) for name in together)
    assert together["flicker"].argmax() == 2 and together["dynamic_degree"].argmax() == 1


class Corners(nn.Module):
    """Features that are the mean colour of a corner: blind to what happens elsewhere."""

    def features(self, pixels):
        assert pixels.ndim == 4
        return pixels[..., :4, :4].mean((2, 3))


def test_consistency_is_of_the_networks_features():
    clip = square(3)
    assert temporal(clip)["consistency"] < 0.99
    torch.testing.assert_close(temporal(clip, frame_features(Corners().eval(), clip))["consistency"], torch.ones(1))
    turning = torch.zeros(1, 3, 3, 8, 8)
    turning[0, 0, 0] = turning[0, 1, 1] = turning[0, 1, 2] = 1  # red, green, green: (0 + 0) / 2, then (1 + 0) / 2
    torch.testing.assert_close(
        temporal(turning, frame_features(Corners().eval(), turning))["consistency"], torch.tensor([0.25])
    )


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 1, 8, 8), (1, 4, 5, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="clips must have shape"):
        temporal(torch.zeros(shape))
