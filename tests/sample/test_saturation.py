"""The watch for guidance that goes too far."""

import pytest
import torch
from oracle import pixel_condition, pixel_model

from priorguide.sample.compare import compare
from priorguide.sample.guidance import Guidance
from priorguide.sample.loop import Sampler
from priorguide.sample.saturation import Energies, Saturation, in_words, saturation


def pictures(spread, n=50):
    return (0.5 + spread * torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def test_contrast_and_clipping_are_relative_to_real_pictures():
    real = pictures(0.1)
    same = saturation(real, real)
    assert same == Saturation(1.0, 0.0, 1.0) and not same.too_far
    double = saturation(pictures(0.2), real)
    assert double.contrast == pytest.approx(2, rel=0.03) and double.too_far
    black_and_white = saturation((real > 0.5).float(), real)
    assert black_and_white.clipped == pytest.approx(1, abs=0.01) and black_and_white.too_far


def test_energy_of_no_guidance_is_1_and_grows_with_the_scale():
    model = pixel_model()
    candidates = {("self", (s,)): Guidance((s,)) for s in (1.0, 3.0, 9.0)}
    compare(model, pixel_condition(), [1, 2, 3], candidates, Sampler(steps=3), watch=(watch := Energies()))
    one, three, nine = watch.means().values()
    assert one == pytest.approx(1, abs=1e-6) and abs(three - 1) > 1e-3 and nine > three


def test_the_warning_names_signs_and_cure():
    assert in_words(("base", (3.0,)), Saturation(1.1, 0.02, 1.2)) is None
    said = in_words(("base", (1.5, 7.5)), Saturation(1.4, 0.02, 1.8))
    assert said == (
        "base at scale 1.5, 7.5 goes too far: 1.40 times the contrast of real pictures and a guided prediction 1.80 "
        "times as strong as the conditional one; try a lower scale, an interval, APG, a mix with self, or self."
    )
    assert in_words(("self", (9.0,)), Saturation(1.4, 0.02, 1.8)).endswith("; try a lower scale, an interval, or APG.")
