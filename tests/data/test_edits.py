"""EditPairs: layouts of folders and shards, columns, augmentation, bad pairs, resuming."""

import io
import json
import re
import tarfile
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from priorguide.data.edits import EDITS, EditPairs
from priorguide.data.sources import BadImages

SIZE = 8


def picture(number, edited):
    """Red tells which pair it is, green which side of the pair, blue left from right."""
    image = Image.new("RGB", (SIZE, SIZE), (number, 200 if edited else 100, 0))
    image.paste((number, 200 if edited else 100, 255), (0, 0, SIZE // 2, SIZE))
    return image


def png(number, edited):
    picture(number, edited).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def lay_out(folder, numbers, columns=("input_file_name", "edited_file_name", "text"), folders=("input", "edited")):
    """As `imagefolder` has it: metadata.jsonl above a folder of originals and one of edited pictures."""
    lines = []
    for number in numbers:
        names = [f"{name}/{number}.png" for name in folders]
        for name, edited in zip(names, (False, True), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture(number, edited).save(folder / name)
        lines.append(dict(zip(columns, (*names, f"edit {number}"), strict=True)))
    write_lines(folder, lines)
    return folder


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    return lay_out(tmp_path / "pairs", range(10, 30))


def pairs(source, **options):
    return EditPairs(str(source), **{"resolution": SIZE, "train_batch_size": 4, **options})


def numbers(batch):
    """Which pairs these are, after checking that both pictures and the text are of the same pair, the right way."""
    red, green, _ = (batch["pixels"].mean((2, 3)) * 255).round().long().unbind(1)
    red_before, green_before, _ = (batch["image"].mean((2, 3)) * 255).round().long().unbind(1)
    assert torch.equal(red, red_before) and set(green.tolist()) == {200} and set(green_before.tolist()) == {100}
    assert batch["text"] == [f"edit {number}" for number in red.tolist()]
    return red.tolist()


def flipped(batch):
    """Which pairs are mirrored, after checking that both pictures of a pair are, or neither."""
    edited, image = (batch[name][:, 2, 0, 0] == 0 for name in ("pixels", "image"))
    assert torch.equal(edited, image)
    return edited.tolist()


def epoch(loader, number=0, read=numbers):
    loader.sampler.set_epoch(number)
    return [value for batch in loader for value in read(batch)]


# --- layouts


def test_a_folder_with_metadata(folder):
    data = pairs(folder, val_fraction=0.2)
    train, held = epoch(data.train_dataloader()), numbers(data.held_out(4))
    assert sorted(train + held) == list(range(10, 30)) and len(held) == 4
    batch = data.held_out(3)
    for name in ("pixels", "image"):
        assert batch[name].shape == (3, 3, SIZE, SIZE) and batch[name].dtype == torch.float32
    assert torch.equal(data.reference(2, 1), batch["pixels"][1:])
    assert numbers(pairs(folder, val_fraction=0.2, seed=5).held_out(4)) == held
    joined = [number for batch in data.val_dataloader() for number in numbers(batch)]
    assert joined == held
    with pytest.raises(ValueError, match="there are 4 validation pictures"):
        data.held_out(5)
    assert len(pairs(folder, max_train_samples=5, max_val_samples=1).splits.held) == 1
    chosen = [sorted(epoch(pairs(folder, max_train_samples=8, seed=seed).train_dataloader())) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("name", ["test", "validation"])
def test_folders_of_splits(tmp_path, name):
    lay_out(tmp_path / "train", range(10, 20))
    lay_out(tmp_path / name, range(50, 53))
    data = pairs(tmp_path, train_batch_size=5)
    assert sorted(epoch(data.train_dataloader())) == list(range(10, 20))
    assert sorted(numbers(data.held_out(3))) == [50, 51, 52]
    (tmp_path / name / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=f"{name} must hold metadata.jsonl"):
        pairs(tmp_path).setup()


@pytest.mark.parametrize(
    "columns",
    [
        ("input_image", "edited_image", "edit_prompt"),
        ("original_image", "edited_image", "instruction"),
        ("original_image_file_name", "edited_image_file_name", "edit"),
        ("source_img", "target_img", "text"),
        ("input", "output", "edit"),
    ],
)
def test_columns_recognised_by_name(tmp_path, columns):
    data = pairs(lay_out(tmp_path, range(10, 15), columns))
    assert set(numbers(data.held_out(1))) <= set(range(10, 15))


def test_columns_given(tmp_path):
    lay_out(tmp_path, range(10, 15), ("a", "b", "c"))
    given = {"original_image_column": "a", "edited_image_column": "b", "edit_prompt_column": "c"}
    assert len(numbers(pairs(tmp_path, **given).held_out(1))) == 1
    turned = {**given, "original_image_column": "b", "edited_image_column": "a"}
    assert (pairs(tmp_path, **turned).held_out(1)["pixels"][0, 1] * 255).round().unique().tolist() == [100]
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    write_lines(tmp_path, [{**row, "text": "a caption", "edit_prompt": row["c"]} for row in rows])
    plain = {**given, "edit_prompt_column": None}
    assert len(numbers(pairs(tmp_path, **plain).held_out(1))) == 1, "edit_prompt is surer than text"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(numbers, original="input_image", edited="edited_image", prompt="edit_prompt"):
    cells = [[{"bytes": png(n, side), "path": None} for n in numbers] for side in (False, True)]
    columns = {original: cells[0], edited: cells[1], prompt: [f"edit {n}" for n in numbers]}
    kinds = {original: datasets.Image(), edited: datasets.Image(), prompt: datasets.Value("string")}
    return columns, datasets.Features(kinds)


def test_parquet_files(tmp_path, cache):
    for split, rows in (("train", range(10, 16)), ("test", range(50, 52))):
        columns, features = table(rows, "image", "pixels", "caption")  # names that mean something else in a batch
        (tmp_path / "set" / split).mkdir(parents=True)
        target = tmp_path / "set" / split / "0.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(target)
    given = {"original_image_column": "image", "edited_image_column": "pixels", "edit_prompt_column": "caption"}
    data = pairs(tmp_path / "set", train_batch_size=6, **given)
    assert sorted(epoch(data.train_dataloader())) == list(range(10, 16))
    assert sorted(numbers(data.held_out(2))) == [50, 51]
    with pytest.raises(ValueError, match="split train must have a column original_image, found image, pixels, caption"):
        pairs(tmp_path / "set").setup()
    with pytest.raises(ValueError, match="edited_image_column must be a column of .*image, pixels.*'caption'"):
        pairs(tmp_path / "set", **{**given, "edited_image_column": "caption"}).setup()


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_webdataset_shards(tmp_path, cache, kind):
    (tmp_path / "set").mkdir()
    text = {"txt": lambda n: f"edit {n}", "json": lambda n: json.dumps({"edit": f"edit {n}", "score": 0.5})}[kind]
    for shard, rows in (("train-0000", range(10, 14)), ("train-0001", range(14, 18)), ("test-0000", range(50, 52))):
        with tarfile.open(tmp_path / "set" / f"{shard}.tar", "w") as tar:
            for n in rows:
                parts = (("input.png", png(n, False)), ("edited.png", png(n, True)), (kind, text(n).encode()))
                for key, content in parts:
                    info = tarfile.TarInfo(f"{n:06d}.{key}")
                    info.size = len(content) if (n, key) != (12, "edited.png") else 20  # this one is cut short
                    tar.addfile(info, io.BytesIO(content))
    data = pairs(tmp_path / "set", train_batch_size=8, num_workers=2 if kind == "json" else 0)
    assert sorted(epoch(data.train_dataloader())) == [10, 11, 13, 13, 14, 15, 16, 17]
    assert sorted(numbers(data.held_out(2))) == [50, 51]
    with pytest.raises(BadImages, match="000012.edited.png"):
        epoch(pairs(tmp_path / "set", train_batch_size=8, max_bad_images=0).train_dataloader())


@pytest.fixture
def hub(monkeypatch):
    """Makes `EditPairs("some/name")` find these columns, of these types."""

    def holds(columns, features, **options):
        rows = datasets.Dataset.from_dict(columns, features=features)
        monkeypatch.setattr(
            "datasets.load_dataset", lambda *asked: asked == ("some/name", "config") and {"train": rows}
        )
        return pairs("some/name:config", **options)

    return holds


def test_a_data_set_on_the_hub(hub):
    columns, features = table(range(10, 16))
    assert len(numbers(hub(columns, features).held_out(1))) == 1
    columns["edited_image"] = [cell["bytes"] for cell in columns["edited_image"]]
    features["edited_image"] = datasets.Value("binary")
    features["input_image"] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    assert len(numbers(hub(columns, features).held_out(1))) == 1, "bytes and structs that are not said to be pictures"


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("edit_prompt", None, "split train, row 2, must have an instruction in edit_prompt, got None"),
        ("edited_image", None, "split train, row 2, must have a picture in edited_image"),
        ("input_image", {"bytes": None, "path": None}, "split train, row 2, must have a picture in input_image"),
    ],
)
def test_rows_that_lack_something(hub, column, cell, message):
    columns, features = table(range(10, 16))
    if cell:  # as other programs write parquet: nothing says that these are pictures
        features[column] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns[column][2] = cell
    with pytest.raises(ValueError, match=message.replace(", must", r" \(must")):
        hub(columns, features, max_bad_images=0).setup()
    data = hub(columns, features, train_batch_size=1, val_fraction=0.5)
    shown = {n for batch in data.train_dataloader() for n in numbers(batch)} | set(numbers(data.held_out(3)))
    assert shown == {10, 11, 13, 14, 15}


# --- what is refused


GOOD = {"input_image": "a.png", "edited_image": "b.png", "edit_prompt": "make it so"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "edit_prompt": None}, r"metadata.jsonl, line 2, must have an instruction in edit_prompt, got None"),
        ({**GOOD, "edit_prompt": " "}, "line 2, must have an instruction in edit_prompt"),
        ({**GOOD, "edit_prompt": 3}, "line 2, must have an instruction in edit_prompt, got 3"),
        ({k: v for k, v in GOOD.items() if k != "edited_image"}, 'line 2, must be an object with "edited_image"'),
        ({**GOOD, "input_image": "../a.png"}, 'line 2, must have a "input_image" inside the folder'),
        ({**GOOD, "edited_image": "/etc/b.png"}, 'line 2, must have a "edited_image" inside the folder'),
        ([GOOD], "line 2, must be a JSON object"),
        (
            {**GOOD, "original_image": "c.png"},
            r"several columns for the original_image \(input_image, original_image\)",
        ),
    ],
)
def test_bad_lines(tmp_path, line, message):
    """Each is refused where none may be."""
    write_lines(tmp_path, [GOOD, line])
    with pytest.raises(ValueError, match=message.replace(", must", r",? \(?must")) as caught:
        pairs(tmp_path, max_bad_images=0).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            ("a", "edited_image", "text"),
            {},
            "a column original_image, found a, edited_image, text: name it by original_",
        ),
        (("input_image", "b", "text"), {}, "a column edited_image"),
        (("input_image", "edited_image", "c"), {}, "a column edit_prompt"),
        (("input_image", "edited_image", "c"), {"edit_prompt_column": "d"}, "edit_prompt_column must be a column of"),
        (
            ("a", "edited_image", "text"),
            {"original_image_column": "edited_image"},
            "must be three, got edited_image, ed",
        ),
    ],
)
def test_columns_that_cannot_be_told(tmp_path, columns, given, message):
    lay_out(tmp_path, range(3), columns)
    with pytest.raises(ValueError, match=message) as caught:
        pairs(tmp_path, **given).setup()
    assert "\n" not in str(caught.value)


def test_bad_sources_and_options(tmp_path, folder):
    with pytest.raises(ValueError, match="must be a folder that exists"):
        pairs(tmp_path / "absent").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a folder or a data set"):
        pairs(tmp_path / "empty").setup()
    with pytest.raises(ValueError, match=r"at most the training pictures of a device \(18\), got 64"):
        pairs(folder, train_batch_size=64).train_dataloader()
    with pytest.raises(ValueError, match="val_fraction"):
        pairs(folder, val_fraction=1.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_lines_are_skipped_and_named_up_to_the_limit(folder, workers, caplog):
    """With a bad picture they count as one kind of row."""
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[3], lines[5] = lines[3][:-4], json.dumps(json.loads(lines[5]) | {"text": None})
    path.write_text("\n".join(lines))
    bad = {int(re.search(r"edited/(\d+)", lines[row])[1]) for row in (3, 5)} | {21}
    (folder / "edited" / "21.png").write_bytes(b"broken")
    data = pairs(folder, num_workers=workers, max_bad_images=3, val_fraction=0.05)
    loader = data.train_dataloader()
    seen = [numbers(batch) for _ in range(2) for batch in loader]
    assert [len(batch) for batch in seen] == [4] * len(seen) and not bad & {n for batch in seen for n in batch}
    if not workers:  # whose log is their own
        assert caplog.text.count("skipped an unreadable picture") == 3
        assert f"{path}, line 4: must be a JSON object, got" in caplog.text
        assert f"{path}, line 6: must have an instruction in text, got None" in caplog.text
    with pytest.raises(ValueError, match=r"at most 2 pictures may be unreadable .*, found 3 among") as caught:
        list(pairs(folder, num_workers=workers, max_bad_images=2, val_fraction=0.05).train_dataloader())
    assert f"{path}, line 4, {path}, line 6" in str(caught.value) and "21.png" in str(caught.value)


def test_more_bad_lines_than_allowed_are_refused_before_training(folder):
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], *("{" for _ in lines[2:])]))
    with pytest.raises(ValueError, match=rf"\(max_bad_images\), found {len(lines) - 2} among {len(lines)}: ") as caught:
        pairs(folder, max_bad_images=1).setup()
    told = "line {} (must be a JSON object, got '{{')"
    assert f"{path}, {told.format(3)}, {path}, {told.format(4)}, {len(lines) - 4} more" in str(caught.value)
    path.write_text("\n".join("{" for _ in lines))
    with pytest.raises(ValueError, match="must have a column original_image"):
        pairs(folder, max_bad_images=100).setup()
    path.write_text("\n".join(json.dumps(json.loads(line) | {"text": ""}) for line in lines))
    with pytest.raises(ValueError, match=rf"none of the {len(lines)} rows can be used: .*line 1, must have an instruc"):
        pairs(folder, max_bad_images=100).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pair_with_a_bad_picture_is_skipped_whole(folder, workers, caplog):
    (folder / "input" / "12.png").write_bytes(b"broken")
    (folder / "edited" / "21.png").unlink()
    data = pairs(folder, num_workers=workers, max_bad_images=2, val_fraction=0.05, random_flip=True)
    seen = [numbers(batch) for _ in range(2) for batch in data.train_dataloader()]
    assert [len(batch) for batch in seen] == [4] * 8 and not {12, 21} & {n for batch in seen for n in batch}
    if workers == 0:
        assert "input/12.png" in caplog.text and "edited/21.png" in caplog.text
        assert caplog.text.count("unreadable") == 2
    data = pairs(folder, num_workers=workers, max_bad_images=1, val_fraction=0.05)
    with pytest.raises(BadImages, match="input/12.png, .*edited/21.png") as caught:
        [epoch(data.train_dataloader(), number) for number in range(2)]
    assert "\n" not in str(caught.value)


# --- augmentation


def test_flips_are_of_both_pictures_and_follow_from_seed_epoch_and_pair(folder):
    def flips(seed=0, number=0, workers=0, rank=None, **options):
        data = pairs(folder, seed=seed, num_workers=workers, **{"random_flip": True, "train_batch_size": 3, **options})
        if rank is not None:
            data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        loader = data.train_dataloader()
        return dict(zip(epoch(loader, number), epoch(loader, number, flipped), strict=True))

    whole = flips()
    assert len(whole) == 18 and 3 < sum(whole.values()) < 15
    assert flips(workers=2) == whole
    assert flips(number=1) != whole and set(flips(number=1)) == set(whole)
    assert flips(seed=1) != whole
    first, second = (flips(rank=rank) for rank in (0, 1))
    assert not first.keys() & second.keys() and first | second == whole, "the same however many devices"
    assert not any(flips(random_flip=False).values())
    data = pairs(folder, random_flip=True, center_crop=False)
    assert not any(flipped(data.held_out(2))) and not any(flipped(next(iter(data.val_dataloader()))))


def test_half_of_the_pairs_are_flipped():
    data = EditPairs(resolution=8, random_flip=True, train_batch_size=5000)
    plain = EditPairs(resolution=8, train_batch_size=5000)
    (one,), (other,) = ([*d.train_dataloader()] for d in (data, plain))
    flips = (one["image"] == other["image"].flip(-1)).flatten(1).all(1) & (one["image"] != other["image"]).flatten(
        1
    ).any(1)
    kept = (one["image"] == other["image"]).flatten(1).all(1)
    assert (flips | kept).all() and 2300 < flips.sum() < 2700


@pytest.fixture
def wide(tmp_path):
    """Pairs three times as wide as high; how blue a place is tells where it lies, in both pictures."""
    ramp = Image.linear_gradient("L").rotate(90).resize((96, 32))
    for number in range(8):
        for name in ("input", "edited"):
            (tmp_path / "wide" / name).mkdir(parents=True, exist_ok=True)
            ramp.convert("RGB").save(tmp_path / "wide" / name / f"{number}.png")
    lines = [{"input": f"input/{n}.png", "output": f"edited/{n}.png", "edit": "none"} for n in range(8)]
    write_lines(tmp_path / "wide", lines)
    return tmp_path / "wide"


def test_crops_are_the_same_for_both_pictures(wide):
    def middles(**options):
        (batch,) = pairs(wide, train_batch_size=7, resolution=16, **options).train_dataloader()
        assert torch.equal(batch["pixels"], batch["image"]), "both are cut out at the same place"
        return batch["pixels"].mean((1, 2, 3))

    assert middles().std() == 0 and abs(middles()[0] - 0.5) < 0.02
    places = middles(center_crop=False)
    assert places.std() > 0.05 and torch.equal(places, middles(center_crop=False))
    held = pairs(wide, resolution=16, center_crop=False).held_out(1)
    assert abs(held["image"].mean() - 0.5) < 0.02


def test_a_grey_picture_is_fitted_like_its_coloured_partner(tmp_path):
    for number in range(2):
        grey = Image.new("L", (28, 28), 200)
        grey.save(tmp_path / f"{number}-grey.png")
        grey.convert("RGB").save(tmp_path / f"{number}-colour.png")
    lines = [{"input": f"{n}-grey.png", "output": f"{n}-colour.png", "edit": "colour it"} for n in range(2)]
    write_lines(tmp_path, lines)
    batch = pairs(tmp_path, resolution=32).held_out(1)
    assert torch.equal(batch["image"], batch["pixels"]), "neither is padded"


# --- resuming


class Watch(pl.LightningModule):
    """Trains nothing; remembers which pairs it saw, and which were mirrored."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((numbers(batch), flipped(batch)))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, steps, workers, out, ckpt_path=None):
    model = Watch()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(out, filename="{step}", every_n_train_steps=steps, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = pairs(folder, train_batch_size=3, num_workers=workers, random_flip=True)  # 6 batches an epoch
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stop", "workers"), [(2, 2), (10, 0)])
def test_lightning_resumes_in_mid_epoch(folder, tmp_path, stop, workers):
    whole = fit(folder, 13, 0, tmp_path / "whole")
    first = fit(folder, stop, 0, tmp_path / "parts")
    rest = fit(folder, 13, workers, tmp_path / "parts", tmp_path / "parts" / f"step={stop}.ckpt")
    assert first == whole[:stop] and first + rest == whole


# --- made pairs


@pytest.mark.parametrize("resolution", [28, 32, 64])
def test_made_pairs(resolution):
    data = EditPairs(resolution=resolution, max_val_samples=200)
    assert len(data.splits.train) == 5000 and len(data.splits.held) == 200
    batch = data.held_out(200)
    assert batch["pixels"].shape == batch["image"].shape == (200, 3, resolution, resolution)
    assert batch["pixels"].min() >= 0 and batch["pixels"].max() <= 1
    assert len(set(batch["text"])) == sum(len(texts) for _, texts in EDITS) == 24
    for pixels, image, text in zip(batch["pixels"], batch["image"], batch["text"], strict=True):
        (change,) = (change for change, texts in EDITS if text in texts)
        assert torch.allclose(pixels, change(image[None])[0]) and not torch.equal(pixels, image)
    again = EditPairs(resolution=resolution, seed=3).held_out(200)
    assert again["text"] == batch["text"] and torch.equal(again["pixels"], batch["pixels"])


def test_every_edit_holds_for_mirrored_pairs():
    pixels = torch.rand(2, 3, 8, 8)
    for change, _ in EDITS:
        assert torch.equal(change(pixels.flip(-1)), change(pixels).flip(-1))


@pytest.mark.filterwarnings("ignore")
def test_configured_by_lightning_cli():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(EditPairs, "data")
    data = parser.instantiate_classes(parser.parse_args(["--data.resolution=32", "--data.random_flip=true"])).data
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (64, 3, 32, 32) and len(batch["text"]) == 64
