"""A server on 127.0.0.1 that speaks the file API of the Hugging Face Hub, and fails on request.

    with FakeHub() as hub:
        hub.add("datasets", "owner/name", {"a/0.parquet": content}, card={...})
        hub.faults["a/0.parquet"] = [("drop", 1000), ("status", 503)]
        ... HF_ENDPOINT=hub.url ...

Each download of a file takes the next of its faults, and is served as it should be after the last:
("drop", n): the connection ends after n bytes; ("truncate", n): a shorter file, n bytes, as if it
were whole; ("status", code); ("corrupt", i): byte i is another one; ("slow", seconds): waits first.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    files: dict[str, bytes]
    card: dict = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)  # sha256 of a file, if not its own


class FakeHub:
    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: dict[str, list[tuple[str, int]]] = {}
        self.requests: list[str] = []  # "GET path", with the range asked for
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, kind: str, name: str, files: dict[str, bytes], card: dict | None = None) -> None:
        """A repository; `kind` is "datasets" or "models"."""
        self.repositories[kind, name] = Repository(files, card or {})

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        self.hub.requests.append(" ".join([self.command, path, asked]).strip())
        name = r"([^/]+/[^/]+)"
        patterns = [
            (rf"/api/(datasets|models)/{name}/tree/([^/]+)(?:/(.*))?", self.tree),
            (rf"/api/(datasets|models)/{name}/paths-info/([^/]+)", self.paths_info),
            (rf"/api/(datasets|models)/{name}(?:/revision/([^/]+))?", self.info),
            (rf"/(?:(datasets)/)?{name}/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for pattern, method in patterns:
            if match := re.fullmatch(pattern, path):
                kind, name, revision, *rest = match.groups()
                repository = self.hub.repositories.get((kind or "models", name))
                if repository is None:
                    return self.refuse(404, "RepoNotFound")
                if revision not in (None, "main", COMMIT):
                    return self.refuse(404, "RevisionNotFound")
                return method(repository, name, *rest)
        self.refuse(404, "")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def info(self, repository: Repository, name: str) -> None:
        siblings = [{"rfilename": path} for path in repository.files]
        facts = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self.send_json(facts | {"cardData": repository.card, "gated": False, "disabled": False})

    def entry(self, repository: Repository, path: str) -> dict:
        content = repository.files[path]
        sha256 = repository.published.get(path, hashlib.sha256(content).hexdigest())
        facts = {"type": "file", "path": path, "size": len(content), "oid": sha256[:40]}
        if path.endswith((".parquet", ".safetensors")):  # kept by LFS
            facts["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return facts

    def tree(self, repository: Repository, name: str, folder: str | None) -> None:
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in repository.files if path.startswith(prefix)]
        if folder and not paths:
            return self.refuse(404, "EntryNotFound")
        self.send_json([self.entry(repository, path) for path in sorted(paths)])

    def paths_info(self, repository: Repository, name: str) -> None:
        asked = json.loads(self.body)["paths"]
        self.send_json([self.entry(repository, path) for path in asked if path in repository.files])

    def resolve(self, repository: Repository, name: str, path: str) -> None:
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound")
        content = repository.files[path]
        fault, argument = None, 0
        if self.command == "GET" and self.hub.faults.get(path):
            fault, argument = self.hub.faults[path].pop(0)
        if fault == "status":
            return self.refuse(argument, "")
        if fault == "slow":
            time.sleep(argument)
        if fault == "corrupt":
            content = content[:argument] + bytes([content[argument] ^ 1]) + content[argument + 1 :]
        if fault == "truncate":
            content = content[:argument]
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        if start >= len(content) > 0 and start:
            return self.refuse(416, "")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        entry = self.entry(repository, path)
        self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        content = content[start:]
        if fault == "drop":
            self.wfile.write(content[:argument])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content)
