"""LabelledImages: sources, splits, order, bad pictures, resuming."""

import json
import logging
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from priorguide.data.labelled import LabelledImages
from priorguide.data.sources import BadImages


def grey(level, path, size=(28, 28)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten pictures; a picture's grey level tells which it is."""
    for i in range(10):
        grey(10 + i, tmp_path / "pictures" / "cat" / f"{i}.png")
        grey(110 + i, tmp_path / "pictures" / "dog" / f"{i}.png")
    return tmp_path / "pictures"


def levels(batch):
    return (batch["pixels"][:, 0, 16, 16] * 255).round().long().tolist()


def epoch(loader, number=0):
    loader.sampler.set_epoch(number)
    return [level for batch in loader for level in levels(batch)]


def test_embedded_set():
    data = LabelledImages(max_train_samples=1000, max_val_samples=500)
    assert data.num_classes == 10 and data.class_names[9] == "Ankle boot"
    assert [len(part) for part in data.splits[:2]] == [1000, 500]
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (64, 1, 32, 32) and batch["pixels"].dtype == torch.float32
    assert batch["pixels"].min() >= 0 and batch["pixels"].max() == 1
    assert batch["label"].shape == (64,) and batch["label"].dtype == torch.int64
    assert len(data.train_dataloader()) == 15 and len(data.val_dataloader()) == 8
    assert LabelledImages(channels=3).held_out(2)["pixels"].shape == (2, 3, 32, 32)
    assert LabelledImages(resolution=16).held_out(2)["pixels"].shape == (2, 1, 16, 16)


def test_seed_chooses_training_pictures_and_order_but_not_validation():
    def first(seed, number=0):
        data = LabelledImages(seed=seed, max_train_samples=100)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return next(iter(loader))["pixels"], data.held_out(20)["pixels"]

    (a, held), (same, _), (other, held_again), (later, _) = first(0), first(0), first(1), first(0, number=1)
    assert torch.equal(a, same) and not torch.equal(a, other) and not torch.equal(a, later)
    assert torch.equal(held, held_again)


def test_held_out_is_fixed_and_draws_nothing():
    data = LabelledImages(transform="rotate", max_val_samples=40)
    before = torch.random.get_rng_state()
    whole = data.held_out(40)
    for name in ("pixels", "image", "label", "class"):
        assert torch.equal(whole[name][10:15], data.held_out(5, offset=10)[name])
    assert torch.equal(data.reference(5, 10), whole["pixels"][10:15])
    list(data.train_dataloader())
    assert torch.equal(before, torch.random.get_rng_state()), "an epoch draws from its own generator"
    joined = [torch.cat([batch[name] for batch in data.val_dataloader()]) for name in ("pixels", "label")]
    assert torch.equal(joined[0], whole["pixels"]) and torch.equal(joined[1], whole["label"])
    for n, offset in ((41, 0), (1, 40), (0, 0), (1, -1)):
        with pytest.raises(ValueError, match="there are 40 validation pictures"):
            data.held_out(n, offset)


def test_transforms_by_name_function_and_their_class_names():
    assert LabelledImages(transform="rotate").num_classes == 8
    assert set(LabelledImages(transform="edges").held_out(2)) == {"pixels", "image", "label"}
    assert set(LabelledImages(transform=lambda batch: {"x": batch["pixels"]}).held_out(2)) == {"x"}


def test_idx_source_and_range(tmp_path):
    from test_fashion import write_pair

    images, labels = write_pair(tmp_path, "train", 50)
    write_pair(tmp_path, "t10k", 12)
    data = LabelledImages(f"idx:{tmp_path}", train_range="10:40", train_batch_size=10)
    assert len(data.splits.train) == 30 and len(data.splits.held) == 12
    batch = data.splits.train.__getitems__(range(30))
    assert (batch["pixels"][:, 0, 2:-2, 2:-2] * 255).round().byte().numpy().tolist() == images[10:40].tolist()
    assert batch["label"].tolist() == labels[10:40].tolist()
    for text in ("40:10", "0:51", "x", "5", "-1:5", ""):
        with pytest.raises(ValueError, match="train_range must be"):
            LabelledImages(f"idx:{tmp_path}", train_range=text).setup()


def test_class_folders_with_a_held_out_share(folder):
    data = LabelledImages(str(folder), train_batch_size=4, val_fraction=0.2)
    assert data.class_names == ("cat", "dog") and data.num_classes == 2
    train, held = epoch(data.train_dataloader()), levels(data.held_out(4))
    assert len(train) == 16 and sorted(train + held) == [*range(10, 20), *range(110, 120)]
    batch = data.held_out(4)
    assert batch["label"].tolist() == [int(level >= 100) for level in held]
    assert batch["pixels"][:, :, :2].sum() == 0, "28x28 is padded"
    assert epoch(data.train_dataloader()) == train != epoch(data.train_dataloader(), 1)
    assert levels(LabelledImages(str(folder), val_fraction=0.2, seed=5).held_out(4)) == held


def test_train_and_test_folders(folder, tmp_path):
    (tmp_path / "set").mkdir()
    folder.rename(tmp_path / "set" / "train")
    grey(200, tmp_path / "set" / "test" / "dog" / "x.png")
    data = LabelledImages(str(tmp_path / "set"))
    assert len(data.splits.train) == 20 and data.held_out(1)["label"].tolist() == [1]
    grey(200, tmp_path / "set" / "test" / "newt" / "x.png")
    with pytest.raises(ValueError, match="labels must be cat, dog; found 'newt', 1 time"):
        LabelledImages(str(tmp_path / "set")).setup()


def write_metadata(folder, rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        if "file_name" in row:
            grey(50, folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_metadata_with_labels_and_texts(tmp_path):
    rows = [{"file_name": f"{i}.png", "label": i % 3, "text": f"number {i}"} for i in range(9)]
    data = LabelledImages(write_metadata(tmp_path / "a", rows), transform=dict, num_classes=3)
    batch = data.held_out(1)
    assert data.class_names == ("0", "1", "2") and batch["text"][0].startswith("number ")
    assert int(batch["text"][0].split()[1]) % 3 == batch["label"].item()
    named = [{"file_name": row["file_name"], "label": "ab"[row["label"] % 2]} for row in rows]
    assert LabelledImages(write_metadata(tmp_path / "b", named)).class_names == ("a", "b")
    texts = [{"file_name": row["file_name"], "text": row["text"]} for row in rows]
    data = LabelledImages(write_metadata(tmp_path / "c", texts), transform="edges")
    assert set(data.held_out(1)) == {"pixels", "image", "text"} and data.num_classes == 0


def test_bad_lines_are_skipped_and_named(tmp_path, caplog):
    rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "text": f"number {i}"} for i in range(12)]
    del rows[4]["label"], rows[6]["text"], rows[7]["file_name"]
    data = LabelledImages(write_metadata(tmp_path / "a", rows), transform=dict, train_batch_size=2, val_fraction=0.01)
    told = {text for batch in data.train_dataloader() for text in batch["text"]}
    assert data.class_names == ("a", "b") and told <= {f"number {i}" for i in (0, 1, 2, 3, 5, 8, 9, 10, 11)}
    for line, fault in ((5, "must have a label, as others have"), (8, 'must be an object with "file_name"')):
        assert caplog.text.count(f"metadata.jsonl, line {line}: {fault}") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"label": 1}], "line 1, must be an object with"),
        ([{"file_name": "../a.png"}], 'line 1, must have a "file_name" inside the folder'),
        ([{"file_name": "a.png", "label": 0}, {"file_name": "b.png"}], r"line 2 \(must have a label, as others have\)"),
        ([{"file_name": "a.png", "label": 0}, {"file_name": "b.png", "label": 3}], r"in \[0, 3\); found 3, 1 time"),
        ([{"file_name": "a.png", "label": -1}, {"file_name": "b.png", "label": 1}], r"in \[0, 3\); found -1"),
        ([{"file_name": "a.png", "label": 0.5}, {"file_name": "b.png", "label": 1}], "whole numbers or all names"),
        ([], "must have a line for each picture"),
    ],
)
def test_bad_metadata(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        LabelledImages(write_metadata(tmp_path / "set", rows), num_classes=3, max_bad_images=0).setup()
    assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path, folder, monkeypatch):
    for source, message in [
        (str(tmp_path / "absent"), "must be a folder that exists"),
        (f"idx:{tmp_path}", "must hold train-images-idx3-ubyte"),
    ]:
        with pytest.raises(ValueError, match=message):
            LabelledImages(source).setup()
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold class folders with pictures"):
        LabelledImages(str(tmp_path / "empty")).setup()
    with pytest.raises(ValueError, match="num_classes is 3"):
        LabelledImages(str(folder), num_classes=3).setup()
    (folder / "newt").mkdir()
    with pytest.raises(ValueError, match="found none in newt"):
        LabelledImages(str(folder)).setup()
    with pytest.raises(ValueError, match=r"at most the training pictures of a device \(10\), got 64"):
        LabelledImages(max_train_samples=10).train_dataloader()
    for options in ({"channels": 2}, {"val_fraction": 0.0}, {"max_train_samples": 0}, {"transform": "nothing"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LabelledImages(**options)
    monkeypatch.setattr("datasets.load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(ValueError, match="'some/name' must be a folder or a data set .*offline"):
        LabelledImages("some/name").setup()


def test_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["b", "a"])})
    for i in range(6):
        grey(40 + i, tmp_path / f"{i}.png")
    cells = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(6)]
    cells[2]["bytes"] = b"broken"
    rows = datasets.Dataset.from_dict({"img": cells, "kind": [0, 1] * 3}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    rows.select([0, 1]).to_parquet(tmp_path / "set" / "test.parquet")
    data = LabelledImages(str(tmp_path / "set"), train_batch_size=6)
    assert data.class_names == ("b", "a"), "the data's own order"
    batch = next(iter(data.train_dataloader()))
    assert sorted(levels(batch)) == [40, 41, 43, 43, 44, 45], "a neighbour stands in for the broken one"
    assert batch["label"].tolist() == [level % 2 for level in levels(batch)]
    assert sorted(levels(data.held_out(2))) == [40, 41]
    with pytest.raises(BadImages, match=": row 2"):
        epoch(LabelledImages(str(tmp_path / "set"), train_batch_size=6, max_bad_images=0).train_dataloader())
    with pytest.raises(ValueError, match="label_column must be a column of .*img, kind"):
        LabelledImages(str(tmp_path / "set"), label_column="x").setup()


@pytest.fixture
def damaged(folder):
    (folder / "cat" / "3.png").write_bytes(b"")
    content = (folder / "dog" / "4.png").read_bytes()
    (folder / "dog" / "4.png").write_bytes(content[: len(content) // 2])
    Image.new("CMYK", (40, 30), (10, 20, 30, 40)).save(folder / "cat" / "cmyk.jpg")
    Image.new("RGB", (33, 50), (1, 2, 3)).quantize(4).save(folder / "dog" / "palette.png")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_reported_and_skipped_up_to_the_limit(damaged, workers, caplog):
    with caplog.at_level(logging.WARNING):
        data = LabelledImages(str(damaged), train_batch_size=4, num_workers=workers, max_bad_images=2, val_fraction=0.1)
        loader = data.train_dataloader()
        seen = [len(batch["pixels"]) for number in range(3) for batch in loader]
    assert seen == [4] * 15, "batches keep their size"
    assert int(data.splits.train.bad.sum()) == 2
    if workers == 0:
        assert all(name in caplog.text for name in ("3.png", "4.png")) and caplog.text.count("unreadable") == 2
    data = LabelledImages(str(damaged), train_batch_size=4, num_workers=workers, max_bad_images=1, val_fraction=0.1)
    with pytest.raises(BadImages) as caught:
        epoch(data.train_dataloader())
    message = str(caught.value)
    assert "3.png" in message and "4.png" in message and "max_bad_images" in message and "\n" not in message


def test_nothing_readable_ends(tmp_path):
    for i in range(4):
        grey(0, tmp_path / "a" / f"{i}.png")
        (tmp_path / "a" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(BadImages, match="found 3 among 3"):
        epoch(LabelledImages(str(tmp_path), train_batch_size=2, max_bad_images=99).train_dataloader())


class Watch(pl.LightningModule):
    """Trains nothing; remembers which pictures it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(levels(batch))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, steps, workers, out, ckpt_path=None):
    model = Watch()
    save = ModelCheckpoint(out, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[save],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = LabelledImages(str(folder), train_batch_size=3, num_workers=workers, val_fraction=0.1)  # 6 batches an epoch
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 6, 10])
def test_lightning_resumes_in_mid_epoch(folder, tmp_path, stop):
    whole = fit(folder, 15, 0, tmp_path / "whole")
    first = fit(folder, stop, 0, tmp_path / "parts")
    rest = fit(folder, 15, 2 if stop == 2 else 0, tmp_path / "parts", tmp_path / "parts" / f"step={stop}.ckpt")
    assert first == whole[:stop] and first + rest == whole
    assert whole[:6] != whole[6:12], "each epoch has its own order"


def test_a_program_ends_though_it_holds_a_loaders_workers(folder):
    code = """if True:
        import sys
        from priorguide.data.labelled import LabelledImages
        data = LabelledImages(sys.argv[1], resolution=8, train_batch_size=2, num_workers=1)
        sys.modules["kept"] = batches = iter(data.train_dataloader())
        next(batches)
    """
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=60)


@pytest.mark.filterwarnings("ignore")
def test_configured_by_lightning_cli(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(LabelledImages, "data")
    for value in ("edges", "priorguide.data.tasks.rotate"):
        data = parser.instantiate_classes(parser.parse_args([f"--data.transform={value}"])).data
        assert "image" in data.held_out(1)
    config = tmp_path / "x.yaml"
    config.write_text("data: {source: fashion, transform: edges, max_train_samples: 1000, train_range: '0:2000'}")
    parser.add_argument("--config", action="config")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).data
    assert len(data.splits.train) == 1000


def test_fetching_a_batch_is_cheap():
    import time

    data = LabelledImages()
    rows, best = list(range(64)), 1.0
    for _ in range(50):
        begun = time.perf_counter()
        data.splits.held.__getitems__(rows)
        best = min(best, time.perf_counter() - begun)
    assert best < 1e-3


def test_flips_follow_from_seed_epoch_and_picture(tmp_path):
    for i in range(16):
        (picture := Image.new("L", (8, 8))).paste(10 * i + 50, (0, 0, 4, 8))
        (tmp_path / "a").mkdir(exist_ok=True)
        picture.save(tmp_path / "a" / f"{i}.png")
    options = {"source": str(tmp_path), "resolution": 8, "train_batch_size": 7}

    def sides(number, **more):
        """Level -> whether it is on the left, over an epoch."""
        loader = LabelledImages(**options, **more).train_dataloader()
        loader.sampler.set_epoch(number)
        pixels = torch.cat([batch["pixels"] for batch in loader])[:, 0, 0]
        return {round(float(row.max()) * 255): bool(row[0] > 0) for row in pixels}

    assert all(sides(0).values())
    flipped = sides(0, random_flip=True)
    assert 2 < sum(flipped.values()) < 12 and sides(0, random_flip=True, num_workers=2) == flipped
    later = sides(1, random_flip=True)
    assert any(flipped[level] != later[level] for level in flipped.keys() & later.keys())
    held = LabelledImages(**options, random_flip=True).held_out(1)["pixels"][0, 0, 0]
    assert held[0] > 0
