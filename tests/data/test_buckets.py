"""Training pictures at their own aspect ratio: sizes, which picture goes to which, the order, what is cut out."""

import itertools
import math
import random
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from test_edits import write_lines
from torch.utils.data import BatchSampler, DistributedSampler

from priorguide.data.buckets import Buckets, describe, nearest
from priorguide.data.edits import EditPairs
from priorguide.data.images import decode, upright_size
from priorguide.data.labelled import LabelledImages
from priorguide.data.orders import EpochOrder, Order

SQUARE, HIGH, WIDE = (32, 32), (40, 24), (24, 40)
BUCKETS = Buckets(step=8)
"""At 32 px: the three sizes above, and 56 x 16 beyond its ratio."""


# --- sizes


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
@pytest.mark.parametrize("step", [8, 32, 64])
@pytest.mark.parametrize("max_ratio", [1, 1.5, 2, 4])
def test_sizes(resolution, step, max_ratio):
    sizes = Buckets(max_ratio, step).sizes(resolution)
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == len(sizes)
    assert set(sizes) == {(width, height) for height, width in sizes}
    for height, width in sizes:
        short, long = sorted((height, width))
        assert height % step == width % step == 0 and long <= max_ratio * short
        assert short * long <= resolution**2 < short * (long + step), "the area is as near as it can be"
    shorter = {min(size) for size in sizes}
    for short in set(range(step, resolution, step)) - shorter:
        assert resolution**2 // short // step * step > max_ratio * short, "none is left out"
    ratios = [max(size) / min(size) for size in sizes]
    assert ratios == sorted(ratios)


def test_sizes_of_stable_diffusion():
    assert Buckets().sizes(256) == [(256, 256), (320, 192), (192, 320)]
    found = Buckets(max_ratio=2.1).sizes(1024)
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (704, 1472)} <= set(found), "of SDXL's own"


@pytest.mark.parametrize(
    ("options", "resolution", "words"),
    [
        ({}, 100, r"resolution must be a multiple of buckets\.step \(64\), got 100"),
        ({"step": 64}, 32, "must be a multiple"),
        ({"step": 0}, 64, r"buckets\.step must be at least 1, got 0"),
        ({"max_ratio": 0.5}, 64, r"buckets\.max_ratio must be at least 1, got 0\.5"),
        ({"max_ratio": math.nan}, 64, "max_ratio must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(options, resolution, words):
    for make in (LabelledImages, EditPairs):
        with pytest.raises(ValueError, match=words) as caught:
            make("folder", resolution=resolution, buckets=Buckets(**options))
        assert "\n" not in str(caught.value)


# --- which picture goes to which size


def test_the_nearest_ratio_by_its_logarithm():
    sizes, dice = Buckets(max_ratio=3).sizes(512), random.Random(0)
    pictures = [(dice.randint(1, 6000), dice.randint(1, 6000)) for _ in range(2000)]
    found = nearest(torch.tensor(pictures), sizes).tolist()
    turned = nearest(torch.tensor(pictures).flip(1), sizes).tolist()
    for (height, width), group, other in zip(pictures, found, turned, strict=True):
        gaps = [abs(math.log(height / width) - math.log(h / w)) for h, w in sizes]
        assert gaps[group] <= min(gaps) + 1e-9
        assert sizes[other] == sizes[group][::-1], "high ones as wide ones"


def test_between_two_the_one_nearer_to_the_square():
    sizes = [(4, 4), (4, 1), (1, 4), (16, 1), (1, 16)]
    pictures = torch.tensor([(2, 1), (1, 2), (200, 100), (8, 1), (1, 8), (21, 10), (81, 10), (0, 0), (1, 1)])
    assert nearest(pictures, sizes).tolist() == [0, 0, 0, 1, 2, 1, 3, 0, 0]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_the_size_of_a_picture_as_it_lies_upright(tmp_path, kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"picture.{kind}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    expected = (20, 30) if turn < 5 else (30, 20)
    for source in (path, {"bytes": path.read_bytes(), "path": None}):
        assert upright_size(source) == expected
        picture = decode(source, expected, 3)
        assert picture.shape[1:] == expected


def test_a_size_is_read_off_the_header_alone(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((300, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert upright_size(path) == (200, 300)
    path.write_bytes(b"broken")
    for source in (path, tmp_path / "absent.png", {"bytes": None, "path": None}, None):
        assert upright_size(source) is None


# --- the order

MANY = list(itertools.product((1, 2, 7, 40, 101), (1, 2, 3, 5), (1, 3, 8), (0, 4)))


def made_groups(count, seed):
    """Of numbers that are not all there, one of them common, one alone."""
    dice = random.Random(seed)
    groups = [dice.choice((0, 0, 0, 0, 2, 3)) for _ in range(count)]
    return torch.tensor([*groups[:-1], 6])


@pytest.mark.parametrize(("count", "world", "size", "seed"), MANY)
def test_every_row_once_an_epoch_in_batches_of_one_group(count, world, size, seed):
    groups = made_groups(count, seed)
    epochs = []
    for epoch in (0, 1):
        ranks = [Order(range(count), size, world, rank, True, seed, groups) for rank in range(world)]
        for order in ranks:
            order.set_epoch(epoch)
        each = [list(order) for order in ranks]
        assert {len(batches) for batches in each} == {len(order) for order in ranks} and len(ranks[0]) == len(each[0])
        steps = list(zip(*each, strict=True))
        for step in steps:
            assert len({len(batch) for batch in step}) == 1 and 1 <= len(step[0]) <= size, "all processes alike"
            assert len({int(groups[row]) for batch in step for row in batch}) == 1
        seen = [row for step in steps for batch in step for row in batch]
        assert set(seen) == set(range(count))
        for group in groups.unique().tolist():
            rows = [row for row in seen if groups[row] == group]
            own = int((groups == group).sum())
            assert len(rows) == -(-own // world) * world, "repeated no more than the processes need"
            sizes = [sum(map(len, step)) for step in steps if groups[step[0][0]] == group]
            assert sorted(sizes)[1:] == [size * world] * (len(sizes) - 1), "one batch of a group is smaller"
        again = Order(range(count), size, world, 0, True, seed, groups)
        again.set_epoch(epoch)
        assert list(again) == each[0]
        for start in (0, len(again) // 2, len(again)):
            again.start = start
            iter(again)  # a loader's iterators come and go
            assert list(again) == each[0][start:] and list(again) == each[0]
        epochs.append(each)
    if count > 7:
        assert epochs[0] != epochs[1]


def test_batches_of_all_groups_are_mixed():
    """A rare group is not always the first nor the last one."""
    groups = torch.tensor([0] * 64 + [1] * 3)
    order = Order(range(67), 4, 1, 0, True, 0, groups)
    places = []
    for epoch in range(200):
        order.set_epoch(epoch)
        places.append([len(batch) for batch in order].index(3))
    assert set(places) == set(range(17)) and 6 < sum(places) / 200 < 10


@pytest.mark.parametrize(("count", "world", "size", "seed"), MANY)
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_groups_the_order_is_torchs_own(count, world, size, seed, shuffle):
    if count < world:
        return
    for rank, epoch in itertools.product(range(world), (0, 1)):
        options = {"shuffle": shuffle, "seed": seed, "drop_last": shuffle}
        sampler = DistributedSampler(range(count), world, rank, **options)
        expected = BatchSampler(sampler, size, drop_last=shuffle)
        for order in (Order(range(count), size, world, rank, shuffle, seed) for _ in range(2)):
            order.set_epoch(epoch)
            sampler.set_epoch(epoch)
            assert list(order) == list(expected) and len(order) == len(expected)
        named = EpochOrder(range(count), size, world, rank, shuffle, seed)
        named.set_epoch(epoch)
        assert list(named) == [[(epoch, row) for row in batch] for batch in expected]


# --- pictures

SHAPES = [(60, 60), (100, 60), (60, 100), (66, 60), (150, 60), (60, 90)]
"""Heights and widths: two squares, two high ones, two wide ones."""


def ramp(height, width):
    """Red grows downwards and green to the right, both by 2 a pixel; blue is a square of 20 px in the middle."""
    picture = torch.zeros(height, width, 3, dtype=torch.uint8)
    picture[..., 0] = (torch.arange(height) * 255 / (height - 1))[:, None]
    picture[..., 1] = torch.arange(width) * 255 / (width - 1)
    top, left = height // 2 - 10, width // 2 - 10
    picture[top : top + 20, left : left + 20, 2] = 255
    return Image.fromarray(picture.numpy())


def lay_out(folder, count=24):
    """Labelled pictures, and the same as pairs with themselves, whose originals are squares; the label tells which."""
    lines, pairs = [], []
    for number in range(count):
        name = f"{number}.png"
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        ramp(*SHAPES[number % 6]).save(folder / "pictures" / name)
        lines.append({"file_name": name, "label": number})
        ramp(60, 60).save(folder / f"square{number}.png")
        pairs.append({"input": f"square{number}.png", "output": f"pictures/{name}", "edit": f"edit {number}"})
    write_lines(folder / "pictures", lines)
    write_lines(folder, pairs)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("oblong"))


def labelled(folder, **options):
    options = {"resolution": 32, "channels": 3, "train_batch_size": 4, "buckets": BUCKETS, **options}
    return LabelledImages(str(folder / "pictures"), **options)


def edit_pairs(folder, **options):
    options = {"resolution": 32, "train_batch_size": 4, "buckets": BUCKETS, **options}
    return EditPairs(str(folder), **options)


def numbers(batch):
    return batch["label"].tolist() if "label" in batch else [int(text.split()[1]) for text in batch["text"]]


@pytest.mark.parametrize("make", [labelled, edit_pairs])
def test_pictures_are_cut_to_their_own_ratio_and_not_squashed(folder, make, capsys):
    data = make(folder)
    batches = list(data.train_dataloader())
    of = {0: SQUARE, 1: HIGH, 2: WIDE, 3: SQUARE, 4: HIGH, 5: WIDE}
    train = [number for batch in batches for number in numbers(batch)]
    assert len(train) == 22 and len(set(train)) == 22
    for batch in batches:
        (shape,) = {of[number % 6] for number in numbers(batch)}
        assert batch["pixels"].shape[2:] == shape
        for picture, number in zip(batch["pixels"], numbers(batch), strict=True):
            height, width = ((picture[2] > 0.5).sum(side).max() for side in (0, 1))
            own = SHAPES[number % 6]
            scale = max(shape[0] / own[0], shape[1] / own[1])
            assert abs(height - width) <= 1 and abs(height - 20 * scale) <= 1.5, "the square in it is a square"
        if "image" in batch:
            assert batch["image"].shape == batch["pixels"].shape, "both pictures of a pair are cut alike"
            height, width = ((batch["image"][0, 2] > 0.5).sum(side).max() for side in (0, 1))
            assert abs(height - width) <= 1
    for other in (data.held_out(2)["pixels"], next(iter(data.val_dataloader()))["pixels"], data.reference(1)):
        assert other.shape[2:] == SQUARE
    said = capsys.readouterr().out
    unalike = sum(number % 6 > 0 for number in train)  # whose originals are squares
    words = f"; in {unalike} pairs the aspect ratios of the two are over 5% apart: they are cut unalike\n"
    assert said.endswith(words if make is edit_pairs else "(height x width)\n")
    assert said.count("buckets: of 22 training pictures") == 1 and " at 32x32, " in said and " at 40x24" in said
    plain = make(folder, buckets=None)
    assert torch.equal(data.held_out(2)["pixels"], plain.held_out(2)["pixels"])
    assert data.fingerprint() == plain.fingerprint()


def test_pairs_of_one_ratio_are_not_called_unalike():
    """Nor those that rounding parts, nor where a size is unknown."""
    pictures = torch.tensor([(60, 90), (90, 60), (100, 100), (0, 0), (60, 60), (60, 60)])
    others = torch.tensor([(400, 600), (61, 40), (100, 104), (90, 60), (0, 0), (64, 60)])
    groups = torch.zeros(6, dtype=torch.long)
    assert describe(groups, [SQUARE], pictures, others).endswith(
        "; in 1 pairs the aspect ratios of the two are over 5% apart: they are cut unalike"
    )
    assert "pairs" not in describe(groups[:5], [SQUARE], pictures[:5], others[:5])


def test_rows_of_datasets_go_to_the_same_sizes(folder, tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [str(folder / "pictures" / f"{n}.png") for n in range(24)], "label": list(range(24))}
    made = datasets.Dataset.from_dict(rows, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": made})
    hub = LabelledImages("somebody/pictures", resolution=32, channels=3, train_batch_size=4, buckets=BUCKETS)
    assert torch.equal(hub.groups, labelled(folder).groups)
    assert {numbers(b)[0] % 3: b["pixels"].shape[2:] for b in hub.train_dataloader()} == {0: SQUARE, 1: HIGH, 2: WIDE}


def test_sets_in_memory_are_squares(capsys):
    for data in (
        LabelledImages(resolution=32, max_train_samples=20, train_batch_size=8, buckets=BUCKETS),
        EditPairs(resolution=32, max_train_samples=20, train_batch_size=8, buckets=BUCKETS, random_flip=True),
    ):
        assert [tuple(batch["pixels"].shape[2:]) for batch in data.train_dataloader()] == [SQUARE] * 3
        assert "20 at 32x32 (height x width)\n" in capsys.readouterr().out


@pytest.mark.parametrize("make", [labelled, edit_pairs])
def test_what_stands_in_for_a_bad_picture_has_the_size_of_the_row_asked_for(make, tmp_path, caplog, capsys):
    lay_out(tmp_path)
    for number in (1, 2):  # a header that tells, and one that does not
        path = tmp_path / "pictures" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60] if number == 1 else b"broken")
    data = make(tmp_path, val_fraction=0.01, train_batch_size=24)
    batches = {tuple(batch["pixels"].shape[2:]): numbers(batch) for batch in data.train_dataloader()}
    assert batches.keys() == {SQUARE, HIGH, WIDE} and sum(map(len, batches.values())) == 23
    assert not {1, 2} & {number for each in batches.values() for number in each}
    assert caplog.text.count("unreadable") == 2
    assert "; 1 of unknown size, as their headers cannot be read, count as squares" in capsys.readouterr().out


def test_a_row_that_cannot_be_used_counts_as_a_square(tmp_path, caplog, capsys):
    lay_out(tmp_path)
    with (tmp_path / "metadata.jsonl").open("a") as lines:
        lines.write('{"input": "square1.png", "output": "pictures/1.png"}\n')
    data = edit_pairs(tmp_path, val_fraction=0.01, train_batch_size=25)
    train = [number for batch in data.train_dataloader() for number in numbers(batch)]
    assert len(train) == 24 and caplog.text.count("unreadable") == 1
    assert "; 1 of unknown size" in capsys.readouterr().out


@pytest.mark.parametrize("make", [labelled, edit_pairs])
def test_flips_and_places_follow_from_seed_epoch_and_row(make, folder):
    """Whatever the batches, workers and devices."""

    def shown(number=0, workers=0, world=1, size=4, **options):
        found = {}
        for rank in range(world):
            data = make(folder, random_flip=True, train_batch_size=size, num_workers=workers, **options)
            alone = SimpleNamespace(broadcast=lambda value: value)
            data.trainer = SimpleNamespace(world_size=world, global_rank=rank, is_global_zero=True, strategy=alone)
            loader = data.train_dataloader()
            loader.sampler.set_epoch(number)
            for batch in loader:
                found |= dict(zip(numbers(batch), batch["pixels"], strict=True))
        return found

    options = {"center_crop": False} if make is edit_pairs else {}
    whole = shown(**options)
    for other in (shown(workers=2, **options), shown(world=2, **options), shown(size=3, **options)):
        assert other.keys() == whole.keys() and all(torch.equal(other[n], whole[n]) for n in whole)
    changed = shown(1, **options)
    flipped = sum(not torch.equal(changed[n], whole[n]) for n in whole)
    assert flipped > 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_resumes_in_mid_epoch(folder, workers):
    def epoch(state=None, stop=None):
        loader = labelled(folder, num_workers=workers, random_flip=True).train_dataloader()
        loader.sampler.set_epoch(3)
        if state:
            loader.load_state_dict(state)
        batches = list(itertools.islice(loader, stop))
        return [batch["pixels"] for batch in batches], loader.state_dict()

    whole, end = epoch()
    first, state = epoch(stop=2)
    rest, _ = epoch(state)
    assert end["batches"] == 0 and state["batches"] == 2
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole, strict=True))


@pytest.mark.parametrize("transform", ["classes", "edges", "rotate"])
def test_tasks_of_oblong_pictures(folder, transform):
    for batch in labelled(folder, transform=transform).train_dataloader():
        assert batch["pixels"].shape[2:] in (SQUARE, HIGH, WIDE)
        if "image" in batch:
            assert batch["image"].shape[2:] == batch["pixels"].shape[2:]
