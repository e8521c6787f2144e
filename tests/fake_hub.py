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

Models can be uploaded, with the token TOKEN: large files by Git LFS, the others in the commit. The
front matter of a README.md must be a YAML mapping.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_test"
LFS = (".parquet", ".safetensors", ".gguf", ".onnx", ".wasm")  # files that the hub keeps by LFS


@dataclass
class Repository:
    files: dict[str, bytes]
    card: dict = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)  # sha256 of a file, if not its own
    commit: str = COMMIT
    private: bool = False
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
        self.uploads: dict[str, bytes] = {}  # by sha256, of files that no commit has named yet
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
        path = unquote(urlsplit(self.path).path)
        uploads = [
            ("/api/repos/create", self.create),
            ("/api/validate-yaml", self.validate),
            ("/api/models/(.+)/preupload/main", self.preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("/api/models/(.+)/commit/main", self.add_commit),
        ]
        for pattern, method in uploads:
            if match := re.fullmatch(pattern, path):
                self.hub.requests.append(f"POST {path}")
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, "")
                return method(*match.groups())
        self.answer()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        sha256 = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != sha256:
            return self.refuse(400, "")
        self.hub.uploads[sha256] = content
        self.send_json({})

    def create(self) -> None:
        request = json.loads(self.body)
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if ("models", name) not in self.hub.repositories:
            self.hub.add("models", name, {})
            self.hub.repositories["models", name].private = request.get("visibility") == "private"
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        valid = match and isinstance(yaml.safe_load(match[1]), dict)
        errors = [] if valid else [{"message": "no front matter"}]
        answer = json.dumps({"errors": errors, "warnings": []}).encode()
        self.send(answer, "application/json", 200 if valid else 400)

    def preupload(self, name: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [(path, "lfs" if path.endswith(LFS) else "regular") for path in paths]
        keys = ("path", "uploadMode")
        files = [dict(zip(keys, mode, strict=True)) | {"shouldIgnore": False} for mode in modes]
        self.send_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def add_commit(self, name: str) -> None:
        repository = self.hub.repositories["models", name]
        if repository.refusal:
            return self.refuse(*repository.refusal)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads.pop(value["oid"])
        url = f"{self.hub.url}/{name}/commit/{COMMIT}"
        self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url})

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

    def send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
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
        facts |= {
            "cardData": repository.card,
            "private": repository.private,
            "gated": False,
            "disabled": False,
        }
        self.send_json(facts)

    def entry(self, repository: Repository, path: str) -> dict:
        content = repository.files[path]
        sha256 = repository.published.get(path, hashlib.sha256(content).hexdigest())
        facts = {"type": "file", "path": path, "size": len(content), "oid": sha256[:40]}
        if path.endswith(LFS):
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
