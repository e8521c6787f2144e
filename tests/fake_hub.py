"""A server on 127.0.0.1 that speaks the file API of the Hugging Face Hub, and fails on request.

    with FakeHub() as hub:
        hub.add("datasets", "owner/name", {"a/0.parquet": content}, card={...})
        hub.faults["a/0.parquet"] = [("drop", 1000), ("status", 503)]
        ... HF_ENDPOINT=hub.url ...

Each download of a file takes the next of its faults, and is served as it should be after the last:
("drop", n): the connection ends after n bytes; ("truncate", n): a shorter file, n bytes, as if it
were whole; ("longer", n): n bytes more than the file has; ("status", code); ("corrupt", i): byte i
is another one; ("slow", seconds): waits first; ("whole", 0): the Range that was asked for is
ignored. `cdn`, another FakeHub with the same repositories, is where downloads are redirected to.
With `log_in` every answer is a web page, as from a network that wants a log-in first.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    files: dict[str, bytes]
    card: dict = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)  # sha256 of a file, if not its own
    commit: str = COMMIT
    refusal: tuple[int, str] | None = None  # status and X-Error-Code of every answer


class FakeHub:
    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: dict[str, list[tuple[str, int]]] = {}
        self.requests: list[str] = []  # "GET path", with the range asked for
        self.authorizations: list[str | None] = []  # the header of each request
        self.api_delay = 0.0  # seconds before the API answers
        self.cdn: FakeHub | None = None
        self.log_in = False
        self.wake = threading.Event()
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
        self.wake.set()
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
        byte_range = self.headers.get("Range", "")
        self.hub.requests.append(" ".join([self.command, path, byte_range]).strip())
        self.hub.authorizations.append(self.headers.get("Authorization"))
        if path.startswith("/api/"):
            self.hub.wake.wait(self.hub.api_delay)
        if self.hub.log_in:
            return self.send(b"<html>Welcome to our hotel</html>", "text/html")
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
                if repository.refusal:
                    return self.refuse(*repository.refusal)
                if revision not in (None, "main", repository.commit):
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
        self.send(json.dumps(value).encode(), "application/json")

    def send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def info(self, repository: Repository, name: str) -> None:
        siblings = []
        for path in repository.files:  # sizes and hashes, as for ?blobs=true
            entry = self.entry(repository, path)
            sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                sibling["lfs"] = lfs | {"sha256": lfs["oid"]}
            siblings.append(sibling)
        facts = {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        facts |= {"cardData": repository.card, "private": False, "gated": False, "disabled": False}
        self.send_json(facts)

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
        entries = {path: self.entry(repository, path) for path in paths}
        for path in paths:
            parents = path.removeprefix(prefix).split("/")[:-1]
            for i in range(1, len(parents) + 1):
                inner = prefix + "/".join(parents[:i])
                oid = hashlib.sha1(inner.encode()).hexdigest()
                entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": oid}
        if "recursive=true" not in urlsplit(self.path).query.lower():
            entries = {k: v for k, v in entries.items() if "/" not in k.removeprefix(prefix)}
        self.send_json([entries[path] for path in sorted(entries)])

    def paths_info(self, repository: Repository, name: str) -> None:
        paths = parse_qs(self.body.decode())["paths"]
        self.send_json([self.entry(repository, path) for path in paths if path in repository.files])

    def resolve(self, repository: Repository, name: str, path: str) -> None:
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound")
        if self.hub.cdn:
            self.send_response(302)
            self.send_header("Location", self.hub.cdn.url + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
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
        if fault == "longer":
            content += bytes(argument)
        start, entry = 0, self.entry(repository, path)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = 0 if fault == "whole" else int(match[1])
        if start >= len(content) > 0 and start:
            return self.refuse(416, "")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
        self.send_header("X-Repo-Commit", repository.commit)
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
