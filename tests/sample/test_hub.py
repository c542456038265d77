"""Names to files: local paths, the Hub's cache laid out by hand, and a Hub of one folder on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from priorguide.sample.hub import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
PIPELINE = {
    "model_index.json": "{}",
    "all-in-one.safetensors": "one file",
    "unet/config.json": "{}",
    "unet/weights.safetensors": "weights",
    "unet/weights.fp16.safetensors": "half",
    "unet/weights.bin": "a pickle",
    "tokenizer/merges.txt": "merges",
    "run.py": "code",
}


def ask(environment: dict[str, str], *calls: dict) -> list[str]:
    """What `locate` answers in a process with this environment, call by call: a path, or the error's kind and words."""
    code = """import json, sys
from priorguide.sample.hub import locate
for call in json.loads(sys.argv[1]):
    try:
        print(locate(**call))
    except Exception as error:
        print(type(error).__name__, *str(error).split())
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def held(folder: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


def lay_out(home: Path, files: dict[str, str]) -> Path:
    """A cache that holds these files of owner/name at its branch main; returns the snapshot's folder."""
    repository = home / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content.encode()).hexdigest()
        link = repository / "snapshots" / COMMIT / name
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link.symlink_to(blob)
    return repository / "snapshots" / COMMIT


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a download needs: owner/name is a pipeline, owner/gated has terms."""

    def __init__(self, files, *args):
        self.files = files
        super().__init__(*args)

    def do_GET(self):
        where = unquote(urlsplit(self.path).path)
        if "/owner/gated" in where:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/owner/name" not in where:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in where or "/tree/" in where:
            revision = where.split("/")[-1]
            if revision not in ("main", "v1", COMMIT):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif "/tree/" in where:
                rows = [{"type": "file", "path": n, "oid": n, "size": len(c)} for n, c in self.files.items()]
                self.answer(200, json.dumps(rows).encode())
            else:
                self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif (name := where.split("/", 5)[5]) in self.files:
            etag = hashlib.sha256(self.files[name].encode()).hexdigest()
            self.answer(200, self.files[name].encode(), {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The address of a Hub that holds PIPELINE."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, PIPELINE))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_lies_here_is_returned_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "model.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    assert locate(tmp_path / "model.ckpt") == tmp_path / "model.ckpt"
    assert locate("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "name", ["nowhere", "./owner/name", "/owner/name", "runs/model.ckpt", "owner/na--me", "a/b//", "a/b/../c"]
)
def test_a_name_that_is_neither_path_nor_id(name):
    with pytest.raises(FileNotFoundError, match=r"is neither a file or folder here nor a Hub id \(owner/name or"):
        locate(name)


def test_offline_from_the_cache(tmp_path):
    snapshot = lay_out(tmp_path, {"config.json": "{}", "model.safetensors": "weights", "deep/last.ckpt": "a pickle"})
    home = {"HF_HOME": str(tmp_path), **OFFLINE}
    name = {"name": "owner/name"}
    calls = [name, {"name": "owner/name/deep/last.ckpt"}, {**name, "revision": COMMIT}, {**name, "allow_patterns": "*"}]
    folder, file, at_commit, all_of_it = ask(home, *calls)
    assert folder == at_commit == all_of_it == str(snapshot)
    assert Path(file).read_text() == "a pickle" and file == str(snapshot / "deep" / "last.ckpt")


def test_offline_and_not_in_the_cache(tmp_path):
    lay_out(tmp_path, {"config.json": "{}"})
    home = {"HF_HOME": str(tmp_path), **OFFLINE}
    calls = [{"name": "owner/other"}, {"name": "owner/name/x.ckpt"}, {"name": "owner/name", "revision": "v2"}]
    for answer, missing in zip(
        ask(home, *calls), ("owner/other", "x.ckpt", "owner/name at revision 'v2'"), strict=True
    ):
        kind, words = answer.split(" ", 1)
        assert kind == "FileNotFoundError" and "the Hub is out of reach (or HF_HUB_OFFLINE is set)" in words
        assert words.endswith(f"its cache {tmp_path / 'hub'} does not hold all of {missing}")


def test_a_hub_that_cannot_be_reached(tmp_path):
    home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    (answer,) = ask(home, {"name": "owner/name"})
    assert answer.startswith("FileNotFoundError 'owner/name'") and "the Hub is out of reach" in answer


def test_of_a_pipeline_only_its_folders_are_fetched(tmp_path, hub):
    home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    (folder,) = ask(home, {"name": "owner/name", "revision": "v1"})
    assert held(folder) == {"model_index.json", "unet/config.json", "unet/weights.safetensors", "tokenizer/merges.txt"}
    assert ask({**home, **OFFLINE}, {"name": "owner/name", "revision": "v1"}) == [folder]


def test_files_asked_for_by_name_or_pattern(tmp_path, hub):
    home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}
    file, folder = ask(
        home, {"name": "owner/name/all-in-one.safetensors"}, {"name": "owner/name", "allow_patterns": ["*.bin"]}
    )
    assert Path(file).read_text() == "one file"
    assert held(folder) == {"unet/weights.bin", "all-in-one.safetensors"}


def test_what_the_hub_does_not_have(tmp_path, hub):
    calls = [
        {"name": "owner/other"},
        {"name": "owner/name", "revision": "v2"},
        {"name": "owner/name/no/such.ckpt"},
        {"name": "owner/gated"},
    ]
    other, revision, file, gated = ask({"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub}, *calls)
    assert other.startswith(
        "FileNotFoundError 'owner/other' is no file or folder here, and the Hub shows no owner/other"
    )
    assert revision == "FileNotFoundError the Hub's owner/name has no revision 'v2'"
    assert file == "FileNotFoundError the Hub's owner/name has no file no/such.ckpt"
    assert gated.startswith("PermissionError") and f"{hub}/owner/gated" in gated
