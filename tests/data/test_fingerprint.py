"""What tells a data set's files apart: their names, sizes and both ends, in folders too; never their times."""

import os
from types import SimpleNamespace

from priorguide.data.fingerprint import END, MARK, contents, first_changed, marks


def test_files_by_both_ends_and_their_sizes(tmp_path):
    clip, video, gone = tmp_path / "clip", tmp_path / "video.mp4", tmp_path / "gone.png"
    (clip / "images").mkdir(parents=True)
    (clip / "images" / "0.png").write_bytes(b"first")
    (clip / "1.png").write_bytes(b"second")
    (clip / ".hidden").write_bytes(b"")
    content = bytearray(3 * END)
    video.write_bytes(content)
    data = SimpleNamespace(pictures=[clip, video, gone, video])
    digest, files = contents(data)
    assert files == [clip / "1.png", clip / "images" / "0.png", video, gone]
    before = marks(files)
    assert len(before) == 4 * MARK and before.endswith("0" * MARK) and first_changed(files, before, before) is None
    os.utime(video, (0, 0))
    (clip / ".hidden").write_bytes(b"more")
    assert contents(data) == (digest, files) and marks(files) == before
    for place in (0, END - 1, 2 * END, 3 * END - 1):
        video.write_bytes(content[:place] + b"x" + content[place + 1 :])
        assert first_changed(files, before, marks(files)) == video
    video.write_bytes(content[:-END])
    assert first_changed(files, before, marks(files)) == video
    video.write_bytes(content)
    (clip / "images" / "0.png").write_bytes(b"First")
    assert contents(data)[0] == digest and first_changed(files, before, marks(files)) == clip / "images" / "0.png"
    (clip / "1.png").rename(clip / "2.png")
    assert contents(data)[0] != digest
    assert first_changed(files, before, before + before) is None
