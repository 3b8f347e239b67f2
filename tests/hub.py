"""A hub of one folder: what huggingface_hub asks of the real one to list, describe and fetch a repository's files.

As a program it serves FOLDER as ID on HOST:PORT until it is ended.
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub(ThreadingHTTPServer):
    """sent: how many bytes of each file were sent; gone: files that it refuses to send"""

    daemon_threads = True

    def __init__(self, hub_id: str, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.id, self.folder = hub_id, folder
        self.commit = hashlib.sha1(hub_id.encode()).hexdigest()
        self.sent: dict[str, int] = {}
        self.gone: set[str] = set()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def files(self) -> list[dict[str, Any]]:
        there = sorted(file for file in self.folder.rglob("*") if file.is_file())
        names = [file.relative_to(self.folder).as_posix() for file in there]
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, file in zip(names, there, strict=True)
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if re.fullmatch(f"/api/models/{hub.id}(/revision/[^/]+)?", path):
            told = [{"rfilename": file["path"]} for file in hub.files()]
            self._send(json.dumps({"id": hub.id, "sha": hub.commit, "siblings": told}).encode(), body)
        elif re.fullmatch(f"/api/models/{hub.id}/tree/[^/]+", path):
            self._send(json.dumps(hub.files()).encode(), body)
        elif (found := re.fullmatch(f"/{hub.id}/resolve/[^/]+/(.*)", path)) and found[1] not in hub.gone:
            self._send_file(found[1], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send_file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if asked is not None:
            start, stop = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1)
        if body:
            self.server.sent[name] = self.server.sent.get(name, 0) + stop - start
        own = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.commit}
        if asked is not None:
            own["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(data[start:stop], body, 200 if asked is None else 206, own)

    def _send(self, data: bytes, body: bool, status: int = 200, own: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (own or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


if __name__ == "__main__":
    Hub(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])).serve_forever()
