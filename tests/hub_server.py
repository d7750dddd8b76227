"""A Hub on the loopback interface, of the standard library: enough for huggingface_hub to push and pull models.

It keeps commits, branches, tokens and private repositories in memory, checks the sha256 of what is uploaded, and can be
told to refuse uploads or to spoil downloads. It proves the client's path. It does not prove the real service: Xet
storage, signing in, its checks of names, metadata and quotas, pull requests, and its speed are not here.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> sha256
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, str]) -> str:
        text = json.dumps([branch, len(self.commits), sorted(files.items())])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


class LoopbackHub:
    """`with LoopbackHub({"token": "user"}) as hub:` serves on `hub.url`.

    Attributes:
        repos: name -> Repo. uploads: sha256 of the files received, in order. requests: "METHOD path" of all requests.
        uploads_left: refuse uploads after so many more; None: never.
        spoil: path of a file whose downloads have one byte changed, or "" for none; cut: likewise, one byte short.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.uploads_left: int | None = None
        self.spoil = self.cut = ""
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def store(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.blobs[name] = data
        return name

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repo = self.repos[repo_id]
        return {path: self.blobs[sha] for path, sha in repo.commits[repo.branches[branch]].items()}


class Refused(Exception):
    """An answer other than 200, with the error code that huggingface_hub reads."""

    def __init__(self, status: int, message: str, code: str | None = None, headers=None, answer=None):
        super().__init__(message)
        self.status, self.answer = status, answer or {}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


# (method, pattern of the path, name of the method below); repository names have two parts.
REPO = r"(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.*))?", "tree"),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "model_info"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        url, body = urlsplit(self.path), self._read_body()
        try:
            with self.hub.lock:
                for method, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and method == self.command:
                        arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                        answer = getattr(self, name)(body=body, query=parse_qs(url.query), **arguments)
                        return self._send(200, *answer if isinstance(answer, tuple) else (json.dumps(answer).encode(),))
                raise Refused(404, f"no such page: {self.command} {self.path}")
        except Refused as error:
            self._send(error.status, json.dumps({"error": str(error), **error.answer}).encode(), error.headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *arguments):
        """Silent."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        # As on the Hub: who may not read a repository cannot tell it from one that does not exist.
        if repo is None or (repo.private and user != repo.owner):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            raise Refused(403, f"Forbidden: you don't have the rights to write to {repo_id}")
        return repo

    def _files(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, str]]:
        repo = self._repo(repo_id)
        commit = repo.branches.get(revision or "main", revision)
        if commit not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def whoami(self, body, query):
        if (user := self._user()) is None:
            raise Refused(401, "Invalid username or password.")
        return {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, body, query):
        wanted, user = json.loads(body), self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if owner != user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", answer=answer)
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.hub.repos[repo_id] = Repo(owner, private)
        return answer

    def validate_yaml(self, body, query):
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, revision, body, query):
        self._repo(repo_id, write=True)
        files = json.loads(body)["files"]
        modes = ["lfs" if f["path"].endswith((".safetensors", ".bin", ".pt", ".png")) else "regular" for f in files]
        return {"files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes)]}

    def lfs_batch(self, repo_id, body, query):
        self._repo(repo_id, write=True)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid, body, query):
        if self.hub.uploads_left == 0:
            raise Refused(400, "The loopback Hub was told to refuse this upload")
        if self.hub.uploads_left is not None:
            self.hub.uploads_left -= 1
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "sha256 of the upload differs from its name")
        self.hub.uploads.append(self.hub.store(body))
        return b"", {}

    def commit(self, repo_id, revision, body, query):
        repo = self._repo(repo_id, write=True)
        files = dict(self._files(repo_id, revision)[1])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(revision, files)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit, "hookOutput": ""}

    def branch(self, repo_id, branch, body, query):
        repo = self._repo(repo_id, write=True)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def refs(self, repo_id, body, query):
        branches = self._repo(repo_id).branches
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches.items()]
        return {"branches": heads, "tags": [], "converts": []}

    def tree(self, repo_id, revision, body, query, under=None):
        _, files = self._files(repo_id, revision)
        entries = []
        for path, sha in sorted(files.items()):
            if under and not path.startswith(under + "/"):
                continue
            data = self.hub.blobs[sha]
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        if under and not entries:
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        return entries

    def model_info(self, repo_id, body, query, revision=None):
        commit, files = self._files(repo_id, revision)
        card = self.hub.blobs.get(files.get("README.md"), b"").decode()
        tag = re.search(r"^pipeline_tag: (.+)$", card, flags=re.MULTILINE)
        config = json.loads(self.hub.blobs.get(files.get("config.json"), b"{}"))
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": self.hub.repos[repo_id].private,
            "tags": [],
            "library_name": "transformers" if "library_name: transformers" in card else None,
            "pipeline_tag": tag and tag[1],
            "config": {key: config[key] for key in ("architectures", "auto_map", "model_type") if key in config},
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def resolve(self, repo_id, revision, path, body, query):
        commit, files = self._files(repo_id, revision)
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit})
        data = self.hub.blobs[files[path]]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{files[path]}"',
            "X-Linked-Etag": f'"{files[path]}"',
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if path == self.hub.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return (data[:-1] if path == self.hub.cut else data), headers


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
