"""ObjectViews: layouts of renders, cameras, pairs that follow from the epoch, what is unreadable, generated solids."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from priorguide.data.solids import Solid, draw_solid, look_from, render
from priorguide.data.views import ObjectViews, read_camera, relative_pose

SIZE = 8
ANGLES = [(1.0, 0.3, 1.5), (1.2, -2.0, 1.8), (0.4, 2.5, 2.1), (2.0, 3.0, 1.6)]
"""Polar angle, azimuth and radius of the views of every object."""


def picture(thing, view):
    """Red tells the object, green the view; the left half is transparent, over black."""
    image = Image.new("RGBA", (SIZE, SIZE), (20 * thing, 50 * view, 7, 255))
    image.paste((0, 0, 0, 0), (0, 0, SIZE // 2, SIZE))
    return image


def lay_out(folder, objects=range(5)):
    """As Zero-1-to-3's authors rendered Objaverse: NNN.png and NNN.npy in a folder per object."""
    for thing in objects:
        (place := folder / f"{thing:04x}").mkdir(parents=True)
        for view, angles in enumerate(ANGLES):
            picture(thing, view).save(place / f"{view:03d}.png")
            np.save(place / f"{view:03d}.npy", look_from(*angles))
    return folder


def as_transforms(folder):
    """The same objects in NeRF's layout: the cameras of an object in one file, camera to world."""
    for place in folder.iterdir():
        frames = []
        for file in sorted(place.glob("*.npy")):
            matrix = np.concatenate([np.load(file), [[0, 0, 0, 1]]])
            frames.append({"file_path": f"./{file.stem}", "transform_matrix": np.linalg.inv(matrix).tolist()})
            file.unlink()
        (place / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.85, "frames": frames}))
    return folder


def views(source, **options):
    return ObjectViews(str(source), **{"resolution": SIZE, "train_batch_size": 4, **options})


def read(batch):
    """(object, target view, input view) of each row, after checking that all of it belongs together."""
    seen = {}
    for name in ("pixels", "image"):
        assert batch[name].shape[1:] == (3, SIZE, SIZE) and (batch[name][..., :2] > 0.99).all()  # white behind
        red, green, _ = (batch[name][..., -1, -1] * 255).round().long().unbind(1)
        seen[name] = (red // 20).tolist(), (green // 50).tolist()
    (thing, target), (other, source) = seen["pixels"], seen["image"]
    assert thing == other
    for pose, to, since in zip(batch["pose"], target, source, strict=True):
        polar, azimuth, radius = (a - b for a, b in zip(ANGLES[to], ANGLES[since], strict=True))
        expected = torch.tensor([polar, math.sin(azimuth), math.cos(azimuth), radius])
        torch.testing.assert_close(pose, expected, rtol=0, atol=1e-5)
    return list(zip(thing, target, source, strict=True))


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [row for batch in loader for row in read(batch)]


@pytest.mark.parametrize("kind", ["npy", "transforms"])
def test_pairs_of_views(tmp_path, kind):
    folder = lay_out(tmp_path / "views")
    data = views(as_transforms(folder) if kind == "transforms" else folder, val_fraction=0.2)
    held = read(data.held_out(4))
    assert len({thing for thing, _, _ in held}) == 1 and {target for _, target, _ in held} == set(range(4))
    rows = epoch(data)
    assert len(rows) == 16 and {thing for thing, _, _ in rows} == set(range(5)) - {held[0][0]}
    assert sorted({(thing, target) for thing, target, _ in rows}) == sorted(
        (thing, target) for thing, target, _ in rows
    )
    assert all(target != source for _, target, source in rows + held)
    assert torch.equal(data.reference(2, 1), data.held_out(4)["pixels"][1:3])
    assert [row for batch in data.val_dataloader() for row in read(batch)] == held


def test_inputs_follow_from_seed_and_epoch_alone(tmp_path):
    folder = lay_out(tmp_path / "views")
    first = epoch(views(folder))
    assert epoch(views(folder)) == first == epoch(views(folder, num_workers=1))
    inputs = [
        dict(((t, v), s) for t, v, s in rows) for rows in (first, epoch(views(folder), 1), epoch(views(folder, seed=1)))
    ]
    assert inputs[0].keys() == inputs[1].keys() and inputs[0] != inputs[1] and inputs[0] != inputs[2]
    assert read(views(folder, seed=1).held_out(4)) == read(views(folder).held_out(4))


def test_folders_of_splits_and_a_choice_of_targets(tmp_path):
    lay_out(tmp_path / "train", range(3))
    lay_out(tmp_path / "test", range(6, 9))
    data = views(tmp_path, max_val_samples=5, max_train_samples=4)
    assert {thing for thing, _, _ in epoch(data)} <= {0, 1, 2} and len(epoch(data)) == 4
    assert len(data.splits.held) == 5 and {thing for thing, _, _ in read(data.held_out(5))} <= {6, 7, 8}
    many = [row for number in range(8) for row in epoch(data, number)]
    assert {source for _, _, source in many} == set(range(4))  # inputs are not only those chosen as targets


def test_an_unreadable_view_is_stood_in_for(tmp_path, caplog):
    folder = lay_out(tmp_path / "views", range(3))
    for view in (1, 3):
        (folder / "0001" / f"{view:03d}.png").write_bytes(b"no picture")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    (folder / "0002").rename(tmp_path / "test" / "0002")
    folder.rename(tmp_path / "train" / "moved")
    for place in (tmp_path / "train" / "moved").iterdir():
        place.rename(tmp_path / "train" / place.name)
    (tmp_path / "train" / "moved").rmdir()
    data = views(tmp_path)
    rows = [row for number in range(6) for row in epoch(data, number)]  # each row is checked against its cameras
    assert {(thing, view) for thing, *both in rows for view in both} == {(0, v) for v in range(4)} | {(1, 0), (1, 2)}
    assert "001.png" in caplog.text and "003.png" in caplog.text
    with pytest.raises(ValueError, match="at most 1 pictures may be unreadable"):
        for number in range(6):
            epoch(views(tmp_path, max_bad_images=1), number)


def test_objects_of_one_view_are_left_out(tmp_path, caplog):
    folder = lay_out(tmp_path / "views")
    for view in range(1, 4):
        (folder / "0003" / f"{view:03d}.npy").unlink()
    (folder / ".cache").mkdir()
    data = views(folder, val_fraction=0.25)
    assert {thing for thing, _, _ in epoch(data) + read(data.held_out(4))} == {0, 1, 2, 4}
    assert "left out 1 objects of fewer than two views, 0003 first" in caplog.text


def write(array):
    return lambda path: np.save(path, array, allow_pickle=True)


SPOILT = [
    write(np.eye(3)),
    write(np.full((3, 4), np.nan)),
    write(np.array([{"a": 1}], dtype=object)),
    lambda path: path.write_bytes(b"cut short"),
    lambda path: path.write_bytes(pickle.dumps([1])),
    lambda path: path.write_bytes(b""),
]


@pytest.mark.parametrize("spoil", SPOILT, ids=["shape", "nan", "objects", "no header", "pickle", "empty"])
def test_a_view_without_a_camera_is_stood_in_for(tmp_path, spoil, caplog):
    folder = lay_out(tmp_path / "views", range(2))
    for place in folder.iterdir():
        spoil(place / "001.npy")
    data = views(folder)
    rows = [row for number in range(6) for row in epoch(data, number)] + read(data.held_out(4))
    assert {view for _, *both in rows for view in both} == {0, 2, 3}
    assert "001.png" in caplog.text and "001.npy must hold a world-to-camera matrix, 3 x 4 finite" in caplog.text
    with pytest.raises(ValueError, match=r"at most 0 pictures may be unreadable \(max_bad_images\), found 1"):
        views(folder, max_bad_images=0).held_out(4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "must hold frames"),
        ('{"frames": [{"file_path": "a", "transform_matrix": [[1, 0]]}]}', r"transform_matrix \(1, 2\)"),
        ('{"frames": [{"file_path": "../a", "transform_matrix": [[1, 0]]}]}', "file_path inside the folder"),
        ('{"frames": [{"file_path": "a"}]}', "must hold frames"),
    ],
)
def test_transforms_that_are_none(tmp_path, content, sentence):
    (lay_out(tmp_path / "views") / "0000" / "transforms.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        views(tmp_path / "views").setup()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: views(folder / "nowhere").setup(), "must be a folder of object folders, or 'generated'"),
        (lambda folder: views(folder).setup(), "must hold object folders with two or more views"),
        (lambda folder: views(lay_out(folder / "one", range(1))).setup(), "at least 2 objects, one for validation"),
        (lambda folder: views("generated").held_out(0), "there are 240 validation pictures"),
    ],
)
def test_bad_sources(tmp_path, make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path)


def test_moves_between_cameras():
    """A camera on the x axis; moved a quarter turn towards y, up to the zenith, twice as far, and not at all."""
    source = torch.tensor([[2.0, 0, 0]]).expand(4, 3)
    target = torch.tensor([[0.0, 2, 0], [0, 0, 2], [4, 0, 0], [2, 0, 0]])
    expected = torch.tensor([[0, 1, 0, 0], [-math.pi / 2, 0, 1, 0], [0, 0, 1, 2], [0, 0, 1, 0]])
    found = relative_pose(target, source)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_generated_solids_are_a_set_of_views():
    data = ObjectViews(resolution=16, train_batch_size=8)
    batch = data.held_out(8)
    assert {name: tuple(part.shape) for name, part in batch.items()} == {
        "pixels": (8, 3, 16, 16),
        "image": (8, 3, 16, 16),
        "pose": (8, 4),
    }
    assert (batch["pixels"] < 0.9).any(1).flatten(1).sum(1).min() > 4  # something is to be seen in each
    torch.testing.assert_close(batch["pose"][:, 1:3].norm(dim=1), torch.ones(8))
    assert len(data.train_dataloader()) == 60 * 12 // 8


def test_a_rendered_cube_is_where_it_should_be():
    """From the x axis its +x face fills the middle; from y, its +y face; and its top lies above."""
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], float)
    cube = Solid(draw_solid(0).normals[:0], np.zeros(0), colours)._replace(
        normals=np.concatenate([np.eye(3), -np.eye(3)]), offsets=np.full(6, 0.3)
    )
    for azimuth, face in ((0.0, 0), (math.pi / 2, 1), (math.pi, 3), (-math.pi / 2, 4)):
        drawn = render(cube, look_from(math.pi / 2, azimuth, 2.0), 33)
        middle = drawn[:, 16, 16].astype(float)
        assert (middle > 100).tolist() == (colours[face] > 0).tolist() and (drawn[:, 0, 0] == 255).all()
    above = render(cube, look_from(math.pi / 4, 0.0, 2.0), 33)
    assert (
        above[2, 12, 16] > 100 > above[0, 12, 16] and above[0, 22, 16] > 100 > above[2, 22, 16]
    )  # blue top, red front
    aside = render(cube, look_from(math.pi / 2, math.pi / 4, 2.0), 33)
    assert aside[0, 16, 12] > 100 > aside[1, 16, 12] and aside[1, 16, 20] > 100 > aside[0, 16, 20]  # +y to the right


@pytest.mark.parametrize("matrix", [np.zeros((3, 4)), np.eye(4)[:3], 5 * np.eye(4)[:3] + 1, np.full((3, 4), np.nan)])
def test_a_camera_that_cannot_be_is_refused(tmp_path, matrix):
    np.save(tmp_path / "000.npy", matrix)
    with pytest.raises(ValueError, match=r"000\.npy must hold a world-to-camera matrix.*found"):
        read_camera(tmp_path / "000.npy")
