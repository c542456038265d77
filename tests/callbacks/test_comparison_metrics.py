"""What a comparison measures when it is given networks for it."""

import pytest
import torch
from fits import Pictures, Seer, tuning
from torch import Tensor, nn

from priorguide.callbacks.comparison import PriorComparison
from priorguide.callbacks.quantities import METRICS
from priorguide.sample.loop import Sampler
from priorguide.sample.metrics import BETTER
from priorguide.sample.verdict import Rule


class Towers(nn.Module):
    """In CLIP's place."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.seen = nn.Linear(16, 6)

    def features(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.seen(pixels.mean((1, 2))), dim=1)

    def texts(self, texts: list[str], batch_size: int) -> Tensor:
        return nn.functional.normalize(torch.tensor([[len(text), 1.0, 0, 0, 0, ord(text[0])] for text in texts]))


class Gap(nn.Module):
    def forward(self, pictures: Tensor, target: Tensor) -> Tensor:
        return (pictures - target).abs().mean((1, 2, 3))


class Captioned(Pictures):
    def held_out(self, n: int, offset: int = 0) -> dict:
        batch = super().held_out(n, offset)
        return batch | {"text": [f"{k} bands" for k in batch["label"].tolist()]}


def evaluate(data=Captioned, full: bool = False, **options):
    sampler = Sampler(steps=2, options={"timestep_spacing": "trailing"})
    options = {"clip": Towers(), "perceptual": Gap(), "metric_network": Seer()} | options
    callback = PriorComparison({"self": None}, [2.0], sampler, num_conditions=8, num_reference=12, **options)
    return callback.evaluate(tuning(), data(), full=full)


def test_captions_pictures_and_targets_reach_their_metrics():
    metrics = evaluate().rows()[0]["metrics"]
    agreement = {"psnr", "accuracy", "clip_text", "clip_image", "clip_direction", "lpips"}
    assert metrics.keys() == {"fd", "kid", "coverage"} | agreement
    without = evaluate(has_target=False, clip=None)
    assert without.rows()[0]["metrics"].keys() == {"fd", "kid", "coverage", "accuracy"}
    assert "clip_text" not in evaluate(Pictures).rows()[0]["metrics"]


def test_what_is_named_and_what_the_rule_names_is_measured():
    options = dict(metrics=["ssim", "recall"], rule=Rule("mmd", {"lpips": 0.1}))
    for full in (False, True):
        found = evaluate(full=full, **options)
        assert found.rows()[0]["metrics"].keys() == {"ssim", "recall", "mmd", "lpips"}
    assert found.verdict.decide_by == "mmd"
    assert found.floor.keys() == {"recall", "mmd"}
    with pytest.raises(ValueError, match="metrics must be among .*, got sharpness"):
        evaluate(metrics=["sharpness"])


def test_every_metric_has_a_name_and_says_which_way_is_better():
    assert METRICS.keys() == BETTER.keys()
    for name, direction in BETTER.items():
        wanted = "" if name == "dynamic_degree" else {1: "higher", -1: "lower"}[direction]
        assert METRICS[name].better == wanted, name
