"""Clips: folders of frames and video files, which frames are taken, captions, bad clips, the generated set."""

import json
import sys
from dataclasses import replace
from importlib import util

import numpy as np
import pytest
import torch
from PIL import Image

from priorguide.data.clips import Clips, parse_size
from priorguide.data.decoding import frames_in, read_clip
from priorguide.data.shapes import DIRECTIONS, MovingShape
from priorguide.data.sources import BadImages

needs_av = pytest.mark.skipif(util.find_spec("av") is None, reason="needs PyAV")
SIZE, LENGTH = 16, 12
CODECS = {"mp4": "h264", "webm": "libvpx-vp9", "avi": "h264", "mkv": "h264", "mov": "mpeg4"}


def picture(number, frame):
    """Red tells which clip it is, green which frame, blue left from right."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[:, SIZE // 2 :, 2] = 20 * number, 20 * frame, 240
    return Image.fromarray(pixels)


def write_folder(place, number, length=LENGTH):
    place.mkdir(parents=True)
    for frame in range(length):
        picture(number, frame).save(place / f"frame{frame}.png")  # frame10 after frame9


def write_gif(path, number, length=LENGTH):
    first, *rest = (picture(number, frame) for frame in range(length))
    first.save(path, save_all=True, append_images=rest, duration=40)


def write_video(path, number, length=LENGTH, codec=None):
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec or CODECS[path.suffix[1:]], rate=24)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.codec_context.max_b_frames = "yuv420p", 5, 2
        for frame in range(length):
            file.mux(stream.encode(av.VideoFrame.from_image(picture(number, frame))))
        file.mux(stream.encode())


def lay_out(folder, numbers=range(1, 11), length=LENGTH):
    """Folders of frames with metadata.jsonl above."""
    lines = []
    for number in numbers:
        write_folder(folder / f"clip {number}", number, length)
        lines.append({"file_name": f"clip {number}", "text": f"clip {number}", "fps": 12})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def clips(source, **options):
    return Clips(str(source), **{"resolution": SIZE, "frames": 4, "train_batch_size": 2, **options})


def told(pixels, channel):
    """What red (which clip) or green (which frame) says, of pixels (..., 3, F, H, W)."""
    return (pixels[..., channel, :, :, :].mean((-2, -1)) * 255 / 20).round().long()


def read(batch):
    """(clip, frames, condition frame, flipped) of each row, after checking that all of it belongs together."""
    numbers, frames = told(batch["pixels"], 0), told(batch["pixels"], 1)
    assert (numbers == numbers[:, :1]).all()
    assert [text.split()[-1] for text in batch["text"]] == [str(number) for number in numbers[:, 0].tolist()]
    assert torch.equal(frames.diff(dim=1), batch["frame_stride"][:, None].expand(-1, frames.shape[1] - 1))
    shown = told(batch["image"].unsqueeze(2), 1)[:, 0]
    assert (frames == shown[:, None]).any(1).all() and batch["fps"].dtype == torch.float32
    flipped = batch["pixels"][:, 2, 0, 0, 0] > 0.5
    assert torch.equal(flipped, batch["image"][:, 2, 0, 0] > 0.5)
    return list(zip(numbers[:, 0].tolist(), map(tuple, frames.tolist()), shown.tolist(), flipped.tolist(), strict=True))


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [row for batch in loader for row in read(batch)]


# --- which frames


def test_a_batch(tmp_path):
    data = clips(lay_out(tmp_path), val_fraction=0.2, frame_stride=2)
    batch = data.held_out(2)
    assert {name: tuple(part.shape) for name, part in batch.items() if name != "text"} == {
        "pixels": (2, 3, 4, SIZE, SIZE),
        "image": (2, 3, SIZE, SIZE),
        "fps": (2,),
        "frame_stride": (2,),
    }
    assert batch["fps"].tolist() == [6, 6] and batch["frame_stride"].tolist() == [2, 2]
    assert batch["pixels"].min() >= 0 and batch["pixels"].max() <= 1
    assert torch.equal(batch["image"], batch["pixels"][:, :, 0])
    rows = epoch(data)
    assert sorted(number for number, *_ in rows) == sorted(set(range(1, 11)) - {row[0] for row in read(batch)})
    assert torch.equal(data.reference(1, 1), batch["pixels"][1:])


def test_draws_follow_from_seed_and_epoch_alone(tmp_path):
    lay_out(tmp_path)
    options = {"frame_stride": (1, 3), "condition_frame": "random", "random_flip": True}
    first = epoch(clips(tmp_path, **options))
    assert first == epoch(clips(tmp_path, **options)) == epoch(clips(tmp_path, num_workers=1, **options))
    assert sorted(first) != sorted(epoch(clips(tmp_path, **options), 1))
    assert sorted(first) != sorted(epoch(clips(tmp_path, seed=1, **options)))
    rows = [row for number in range(12) for row in epoch(clips(tmp_path, **options), number)]
    assert {frames[1] - frames[0] for _, frames, *_ in rows} == {1, 2, 3}
    assert {frames.index(shown) for _, frames, shown, _ in rows} == set(range(4))
    assert {flipped for *_, flipped in rows} == {True, False}
    assert {frames[0] for _, frames, *_ in rows} >= {0, 8} and max(frames[-1] for _, frames, *_ in rows) == 11


def test_validation_is_fixed_and_shows_first_frames_unflipped(tmp_path):
    lay_out(tmp_path)
    options = {"frame_stride": (1, 3), "condition_frame": "random", "random_flip": True, "val_fraction": 0.5}
    rows = read(clips(tmp_path, **options).held_out(5))
    assert rows == read(clips(tmp_path, seed=7, **options).held_out(5))
    assert all(shown == frames[0] and not flipped for _, frames, shown, flipped in rows)
    data = clips(tmp_path, max_val_samples=3, **options)
    assert read(data.held_out(3)) == rows[:3] == [row for batch in data.val_dataloader() for row in read(batch)]


def test_interpolation_gives_both_ends(tmp_path):
    batch = clips(lay_out(tmp_path), interpolation=True).held_out(1)
    assert torch.equal(batch["image"], batch["pixels"][:, :, 0])
    assert torch.equal(batch["last"], batch["pixels"][:, :, -1])


def test_a_stride_that_does_not_fit_gives_way_down_to_the_least(tmp_path):
    data = clips(lay_out(tmp_path, length=8), frame_stride=(2, 9))
    assert {frames for _, frames, *_ in epoch(data)} <= {(0, 2, 4, 6), (1, 3, 5, 7)}


def test_height_and_width(tmp_path):
    assert parse_size("320x512") == (320, 512) and parse_size(256) == parse_size("256") == (256, 256)
    write_folder(tmp_path / "a", 1)
    (wide, _), (tall, _) = (read_clip(tmp_path / "a", lambda count: [0], size) for size in ((8, 16), (32, 8)))
    assert wide.shape == (1, 3, 8, 16) and tall.shape == (1, 3, 32, 8)
    blue = wide[0, 2].float().mean(0)
    assert blue[0] < 10 and blue[-1] > 230, "the whole width is there"


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    write_folder(tmp_path / "a", 1)
    assert [path.stem for path in frames_in(tmp_path / "a")] == [f"frame{i}" for i in range(LENGTH)]


# --- files


def test_captions_beside_the_clips(tmp_path):
    for split, numbers in (("train", range(1, 5)), ("test", range(5, 7))):
        for number in numbers:
            write_folder(tmp_path / split / f"v1.{number}", number)
            (tmp_path / split / f"v1.{number}.txt").write_text(f"clip {number}\n")
        write_gif(tmp_path / split / f"{7 + len(numbers)}.gif", 7 + len(numbers))
        (tmp_path / split / f"{7 + len(numbers)}.txt").write_text(f"clip {7 + len(numbers)}")
    (tmp_path / "train" / "readme.txt").write_text("about")
    data = clips(tmp_path, train_batch_size=5, fps=6)
    assert sorted(number for number, *_ in epoch(data)) == [1, 2, 3, 4, 11]
    batch = data.held_out(3)
    assert sorted(number for number, *_ in read(batch)) == [5, 6, 9]
    assert sorted(batch["fps"].tolist()) == [6, 6, 25]  # the animation has its own


@pytest.mark.parametrize(("kind", "options"), [("gif", {}), ("webp", {"lossless": True})])
def test_animations_need_no_pyav(tmp_path, kind, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    first, *rest = (picture(3, frame) for frame in range(LENGTH))
    first.save(path := tmp_path / f"a.{kind}", save_all=True, append_images=rest, duration=40, **options)
    for wanted in ([0, 1, 2, 3], [2, 7, 11]):
        frames, fps = read_clip(path, lambda count, wanted=wanted: wanted, SIZE)
        assert told(frames.float().transpose(0, 1) / 255, 1).tolist() == wanted and fps == 25


@needs_av
@pytest.mark.parametrize("kind", CODECS)
def test_video_files_give_the_frames_asked_for(tmp_path, kind):
    write_video(path := tmp_path / f"a.{kind}", 3)
    for wanted in ([0, 1, 2, 3], [6, 7, 8], [1, 5, 9, 11], [11]):
        counts = []
        frames, fps = read_clip(path, lambda count, wanted=wanted, counts=counts: counts.append(count) or wanted, SIZE)
        assert frames.dtype == torch.uint8 and frames.shape == (len(wanted), 3, SIZE, SIZE)
        assert told(frames.float().transpose(0, 1) / 255, 1).tolist() == wanted
        assert counts == [LENGTH] and fps == pytest.approx(24, rel=0.01)


@needs_av
def test_a_video_that_is_stored_on_its_side_stands_upright(tmp_path):
    write_video(path := tmp_path / "a.mp4", 3)
    upright, _ = read_clip(path, lambda count: [5], SIZE)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44  # the matrix, after the box's name, its flags and nine other fields
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE << 16, 0, 1 << 30], ">i4").tobytes()  # clockwise
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    found, _ = read_clip(path, lambda count: [5], SIZE)
    assert torch.equal(found, upright.rot90(-1, (2, 3)))


@needs_av
def test_videos_with_metadata_among_broken_ones(tmp_path, caplog):
    lines = [{"file_name": f"{number}.mp4", "text": f"clip {number}"} for number in range(1, 9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for number in range(1, 6):
        write_video(tmp_path / f"{number}.mp4", number)
    (tmp_path / "6.mp4").write_bytes(b"")
    (tmp_path / "7.mp4").write_bytes((tmp_path / "1.mp4").read_bytes()[:300])
    data = clips(tmp_path, max_bad_clips=3, val_fraction=0.2)
    rows = [row for number in range(3) for row in epoch(data, number)] + read(data.held_out(2))
    assert {number for number, *_ in rows} == set(range(1, 6))
    for number in (6, 7, 8):  # 8 does not exist
        assert f"skipped an unreadable clip, {tmp_path / f'{number}.mp4'}" in caplog.text
    assert caplog.text.count("skipped") <= 2 * 3  # each once a split at most


def test_too_few_frames_and_broken_pictures_are_reported_and_stood_in_for(tmp_path, caplog):
    train, _ = lay_out(tmp_path / "train", range(1, 7)), lay_out(tmp_path / "test", [9])
    for frame in range(3, LENGTH):
        (train / "clip 4" / f"frame{frame}.png").unlink()
    for frame in range(LENGTH):
        (train / "clip 5" / f"frame{frame}.png").write_bytes(b"" if frame % 2 else b"no picture")
    assert sorted({number for number, *_ in epoch(clips(tmp_path))}) == [1, 2, 3, 6]
    assert "clip 4: it has 3 frames, 4 at stride 1 take 4" in caplog.text and "clip 5" in caplog.text
    for workers in (0, 1):
        with pytest.raises(BadImages, match=r"at most 1 clips may be unreadable \(max_bad_clips\), found 2") as caught:
            epoch(clips(tmp_path, max_bad_clips=1, num_workers=workers))
        assert "\n" not in str(caught.value) and "clip 4" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\0" * 100])
def test_a_broken_animation_is_reported(tmp_path, content, caplog):
    lay_out(tmp_path, range(1, 4))
    (tmp_path / "clip 4.gif").write_bytes(content)
    with (tmp_path / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "clip 4.gif", "text": "clip 4"}) + "\n")
    data = clips(tmp_path, val_fraction=0.25, train_batch_size=1)
    assert 4 not in {number for number, *_ in epoch(data) + read(data.held_out(1))}
    assert "clip 4.gif" in caplog.text


def test_videos_need_pyav(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.mp4").touch()
        (tmp_path / f"{number}.txt").write_text("a clip")
    monkeypatch.setattr("priorguide.data.decoding.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"0\.mp4 needs PyAV: pip install 'priorguide\[video\]'"):
        clips(tmp_path).setup()


def spoil(folder, **change):
    lines = [json.loads(line) | change for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": " "}, "line 1, must have a caption, got ' '"),
        ({"text": None}, "line 1, must have a caption, got None"),
        ({"file_name": "../a"}, 'line 1, must have a "file_name" inside the folder'),
        ({"fps": 0}, "line 1, must have an fps above 0, or none, got 0"),
    ],
)
def test_bad_metadata(tmp_path, change, sentence):
    spoil(lay_out(tmp_path, range(2)), **change)
    with pytest.raises(ValueError, match=sentence):
        clips(tmp_path).setup()


def test_bad_lines_and_captions_are_skipped_and_named_up_to_the_limit(tmp_path, caplog):
    lay_out(tmp_path / "lines", range(1, 9))
    path = tmp_path / "lines" / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[1], lines[4] = "clip", json.dumps(json.loads(lines[4]) | {"text": 3})
    path.write_text("\n".join(lines))
    data = clips(tmp_path / "lines", max_bad_clips=2, val_fraction=0.5, train_batch_size=1)
    seen = {text for batch in (*data.train_dataloader(), data.held_out(4)) for text in batch["text"]}
    assert seen == {f"clip {n}" for n in (1, 3, 4, 6, 7, 8)} and caplog.text.count("skipped an unreadable clip") == 2
    assert f"{path}, line 2: must be a JSON object, got 'clip'" in caplog.text
    assert f"{path}, line 5: must have a caption, got 3" in caplog.text
    with pytest.raises(
        ValueError, match=r"at most 1 clips may be unreadable \(max_bad_clips\), found 2 among 8: .*line 5"
    ):
        clips(tmp_path / "lines", max_bad_clips=1).setup()
    caplog.clear()
    for number in range(4):
        write_folder(tmp_path / "beside" / f"{number}", number + 1)
        (tmp_path / "beside" / f"{number}.txt").write_text(f"clip {number}" if number else " ")
    data = clips(tmp_path / "beside", val_fraction=0.5, train_batch_size=1)
    seen = {text for batch in (*data.train_dataloader(), data.held_out(2)) for text in batch["text"]}
    assert "" not in seen and "0.txt: must have a caption, got ''" in caplog.text


def test_a_video_without_a_caption(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"a\.mp4, must have its caption beside it, a\.txt; there is none"):
        clips(tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"source": "nowhere at all"}, "source must be a folder of clips, or 'generated'"),
        ({"resolution": "big"}, "resolution must be a number, or HEIGHTxWIDTH such as 320x512, got 'big'"),
        ({"resolution": 0}, "resolution must be a number"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"frame_stride": 0}, "frame_stride at least 1"),
        ({"frame_stride": (3, 2)}, r"or \[min, max\], got 4 and \(3, 2\)"),
        ({"interpolation": True, "condition_frame": "random"}, "leave condition_frame at first"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        clips(**{"source": "generated", **options}).setup()


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="must hold metadata.jsonl, or clips"):
        clips(tmp_path).setup()


# --- the generated set


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_generated_shapes_move_as_their_captions_say(direction):
    drawn = next(shape for shape in map(MovingShape.draw, range(100)) if shape.direction == direction)
    assert drawn.text == f"a {drawn.colour} {drawn.shape} moves {direction}"
    shape = replace(drawn, colour="white", start=(0.5, 0.5), background=np.zeros((2, 3)))
    frames = shape.frames([0, 4, 8], 64, 96)
    assert frames.shape == (3, 3, 64, 96) and frames.dtype == np.uint8
    centres = np.array([[places.mean() for places in np.nonzero(frame[0] > 127)[::-1]] for frame in frames])
    expected = 4 * shape.speed * 64 * np.array(DIRECTIONS[direction])
    np.testing.assert_allclose(np.diff(centres, axis=0), [expected, expected], atol=0.7)


def test_the_generated_set_needs_no_files():
    data = Clips(resolution="16x24", frames=4, frame_stride=(1, 4))
    batch = data.held_out(40)
    assert batch["pixels"].shape == (40, 3, 4, 16, 24) and len(set(batch["text"])) > 10
    assert torch.equal(batch["fps"] * batch["frame_stride"], torch.full((40,), 8.0))
    assert torch.equal(batch["pixels"], Clips(resolution="16x24", frames=4, frame_stride=(1, 4)).held_out(40)["pixels"])
    assert len(data.train_dataloader()) == 200 // 4
