"""What batches become."""

import pytest
import torch

from priorguide.data import fashion
from priorguide.data.images import fit
from priorguide.data.tasks import TASKS, classes, edge_map, edges, find, rotate, turn


@pytest.fixture(scope="module")
def batch():
    images, labels = fashion.read_parquet("test")
    return {"pixels": fit(images[:400], 32, pad=True).float() / 255, "label": labels[:400]}


@pytest.mark.parametrize("name", TASKS)
def test_repeatable_per_picture_and_leaves_its_input(batch, name):
    pixels = batch["pixels"].clone()
    whole, again = TASKS[name](batch), TASKS[name](batch)
    part = TASKS[name]({key: value[3:9] for key, value in batch.items()})
    assert torch.equal(batch["pixels"], pixels) and set(batch) == {"pixels", "label"}
    for key, value in whole.items():
        assert torch.equal(value, again[key])
        torch.testing.assert_close(value[3:9], part[key], rtol=0, atol=1e-6)
    assert whole["pixels"].shape == (400, 1, 32, 32) and whole["pixels"].min() >= 0 and whole["pixels"].max() <= 1


def test_edges(batch):
    out = edges(batch)
    assert out["image"].shape == (400, 1, 32, 32) and set(out["image"].unique().tolist()) == {0.0, 1.0}
    assert 0.1 < out["image"].mean() < 0.4
    assert torch.equal(out["pixels"], batch["pixels"]) and torch.equal(out["label"], batch["label"])
    assert edge_map(torch.rand(2, 3, 8, 8)).shape == (2, 1, 8, 8)


def test_edges_of_a_step_lie_on_both_its_sides():
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 0.4  # a Sobel response of 4 x 0.8 = 3.2
    expected = torch.zeros(8, 8)
    expected[:, 3:5] = 1
    assert torch.equal(edge_map(step)[0, 0], expected)
    assert torch.equal(edge_map(step.mT)[0, 0], expected.mT)
    assert edge_map(step * 0.75).sum() == 0  # 2.4


def test_rotation_is_counter_clockwise_and_keeps_its_source(batch):
    pixels = batch["pixels"][:8]
    for k in range(4):
        turned = turn(pixels, torch.full((8,), 2 * k))
        torch.testing.assert_close(turned, pixels.rot90(k, (2, 3)), rtol=0, atol=1e-5)
    diagonal = torch.zeros(1, 1, 32, 32)
    diagonal[..., 15:17, 24:28] = 1  # on the right
    row, column = turn(diagonal, torch.tensor([1]))[0, 0].nonzero().float().mean(0)
    assert row < 10 and column > 21  # now above, on the right
    out = rotate(batch)
    assert torch.equal(out["image"], batch["pixels"]) and torch.equal(out["class"], batch["label"])
    torch.testing.assert_close(out["pixels"], turn(batch["pixels"], out["label"]))


def test_turns_are_spread_and_independent_of_class(batch):
    out = rotate(batch)
    counts = out["label"].bincount(minlength=8)
    assert len(counts) == 8 and counts.min() > 25  # 50 expected
    assert all(len(out["label"][batch["label"] == kind].unique()) >= 7 for kind in range(10))


def test_tasks_are_found_by_name():
    assert find("edges") is edges
    assert find("priorguide.data.tasks.rotate") is rotate
    for name in ("nothing", "priorguide.data.tasks.nothing", "no.such.module", "priorguide.data.tasks.TURNS", ".x"):
        with pytest.raises(ValueError, match="transform"):
            find(name)


def test_tasks_without_labels(batch):
    unlabelled = {"pixels": batch["pixels"]}
    assert set(edges(unlabelled)) == {"pixels", "image"}
    assert set(rotate(unlabelled)) == {"pixels", "image", "label"}
    with pytest.raises(ValueError, match="needs labelled pictures"):
        classes(unlabelled)


def test_an_oblong_picture_turns_as_its_square_would():
    """About its centre, without shear; what leaves the frame is lost, what comes in is black."""
    generator = torch.Generator().manual_seed(0)
    square = torch.zeros(1, 1, 48, 48)
    square[..., 16:32, 16:32] = torch.rand(1, 1, 16, 16, generator=generator)
    for k in range(8):
        turned = turn(square, torch.tensor([k]))
        for high, wide in ((slice(8, 40), slice(0, 48)), (slice(0, 48), slice(10, 38))):
            oblong = turn(square[..., high, wide], torch.tensor([k]))
            torch.testing.assert_close(oblong, turned[..., high, wide], rtol=0, atol=1e-5)


def test_the_edges_of_an_oblong_picture_are_those_of_its_square():
    square = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    whole, part = edge_map(square), edge_map(square[..., 4:16, :])
    assert torch.equal(part[..., 1:-1, :], whole[..., 5:15, :])
