"""A W&B server of a few lines: it takes what a run sends, and keeps it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub(ThreadingHTTPServer):
    """Serves on 127.0.0.1, at `url`, until the `with` block ends. `bodies`: (path, text) of every request.

    `history`: rows received. `configs`: the config of each upsert of the run. `artifacts`: what described
    each. `uploads`: name -> bytes of files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[tuple[str, str]] = []
        self.history: list[dict[str, Any]] = []
        self.configs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Quiet: a client that is done closes its connections."""


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += map(json.loads, lines)
            self._reply({})
        elif self.path != "/graphql":
            self.close_connection = True  # W&B's telemetry of itself
            self._reply({}, 404)
        else:
            sent = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
            data = self._data(operation[1] if operation else "", sent.get("variables") or {})
            self._reply({"data": data} if data else {"errors": [{"message": "unknown to this server"}]})

    def _data(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        if operation == "Viewer":
            return {
                "viewer": {"id": "1", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
            }
        if operation == "UpsertBucket":
            self.server.configs.append(json.loads(variables.get("config") or "{}"))
            project = {"name": "garments", "entity": {"name": "tester"}}
            bucket = {"id": "1", "name": variables["name"], "displayName": "tiny", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.server.url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "CreateArtifact":
            self.server.artifacts.append(variables)
            artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": {"id": "1", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}  # committed: the server has its files already
        return None

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.bodies.append((self.path, body.decode(errors="replace")))
        return body

    def _reply(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
