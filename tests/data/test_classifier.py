"""The metric network."""

import json

import pytest
import torch

from priorguide.data import fashion
from priorguide.data.classifier import RESOLUTION, GarmentClassifier, accuracy, train
from priorguide.data.images import fit


@pytest.fixture(scope="module")
def shown():
    images, labels = fashion.read_parquet("test")
    return fit(images[:2000], RESOLUTION, pad=True), labels[:2000]


def test_pretrained_accuracy_and_record(shown):
    model = GarmentClassifier.pretrained()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    record = json.loads((fashion.FOLDER / "classifier.json").read_text())
    assert record["test_accuracy"] >= 0.88
    assert abs(accuracy(model, *shown) - record["test_accuracy"]) < 0.02
    assert (fashion.FOLDER / "classifier.safetensors").stat().st_size <= 500_000


def test_features_are_alive(shown):
    features = GarmentClassifier.pretrained().features(shown[0].float() / 255)
    assert features.shape == (2000, 64)
    assert (features.std(0) > 0.05).all(), "a dead feature"
    assert (features.max(0).values < 100).all()


def test_wrong_shape_is_refused():
    for shape in ((2, 1, 28, 28), (2, 3, RESOLUTION, RESOLUTION), (1, RESOLUTION, RESOLUTION)):
        with pytest.raises(ValueError, match="pixels must have shape"):
            GarmentClassifier().features(torch.zeros(shape))


def test_training_learns_is_repeatable_and_leaves_the_global_generator_alone():
    images, labels = (part[:600] for part in fashion.read_parquet("train"))
    images = fit(images, RESOLUTION, pad=True)
    before = torch.random.get_rng_state()
    first, second = (train(images, labels, steps=15, batch_size=64) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert accuracy(first, images, labels) > 0.5
