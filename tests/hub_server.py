"""A local Hugging Face Hub for tests: it keeps repositories in memory and answers the HTTP API as huggingface_hub calls it.

    with HubServer(tokens={"hf_secret": "ann"}) as hub:
        HfApi(endpoint=hub.url, token="hf_secret").create_repo("ann/model")

It covers whoami, repository creation, model and data set info, branches, preupload, LFS (batch, upload, verify), commits, tree,
paths-info and resolve with ETag, X-Repo-Commit, X-Linked-Size and ranges. Files with a suffix in LFS_SUFFIXES or above 10 MB go
through LFS. Git objects have their real hashes. The storage that Xet clients want does not exist: set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_storage import GITATTRIBUTES, Blob, Repository, is_lfs, listing

_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<type>models|datasets)/{_ID}"


class ApiError(Exception):
    """An HTTP error with the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The server; a context manager. tokens: token -> user name. A user may write to repositories in his or her name only.

    repositories: ("models" | "datasets", "user/name") -> Repository. requests: (method, path) in order of arrival.
    """

    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = {"hf_test": "user"} if tokens is None else tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._failures: list[list[Any]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path, token: str | None = "hf_test") -> dict[str, str]:
        """Variables for a subprocess whose Hub is this server, with its cache in `home`; no token when `token` is None."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def fail(self, path: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path contains `path` with `status`."""
        self._failures.append([path, status, times])

    def add_repository(self, kind: str, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Create a repository ("models" or "datasets") with these files; returns the commit."""
        repository = self.repositories.setdefault((kind, repo_id), Repository(private=private))
        blobs = {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}
        blobs |= {path: Blob(content, lfs=is_lfs(path, len(content))) for path, content in files.items()}
        return repository.commit("main", blobs, "initial commit")

    def failure_for(self, path: str) -> int | None:
        with self.lock:
            for failure in self._failures:
                if failure[0] in path and failure[2] > 0:
                    failure[2] -= 1
                    return failure[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `requests`; nothing goes to stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self._read_body()
        self.hub.requests.append((self.command, path))
        try:
            if (status := self.hub.failure_for(path)) is not None:
                raise ApiError(status, "failure asked for by the test")
            for method, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock:
                        handler(self, **match.groupdict())
                    return
            raise ApiError(404, f"no such route: {self.command} {path}")
        except ApiError as error:
            self._reply({"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, body: Any, status: int = 200, headers: dict[str, str | None] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value is not None:
                self.send_header(name, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return user

    def _writer_of(self, repo_id: str) -> str:
        user = self._user()
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise ApiError(403, f"You don't have the rights to write to {repo_id}")
        return user

    def _repository(self, kind: str, repo_id: str) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get((kind, repo_id))
        if repository is None or (repository.private and repo_id.split("/")[0] != user):
            # Like the Hub: a stranger cannot tell a private repository from a missing one.
            raise ApiError(404 if user else 401, "Repository not found" if user else "Invalid username or password.", "RepoNotFound")
        return repository

    def _files(self, kind: str, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self._repository(kind, repo_id)
        sha = repository.sha_of(revision)
        if sha is None:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        self._reply({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        user = self._user()
        if user is None:
            raise ApiError(401, "Invalid username or password.")
        repo_id, kind = f"{wanted.get('organization') or user}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        self._writer_of(repo_id)
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            self._reply({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.add_repository(kind, repo_id, {}, private=private)
        self._reply({"url": url, "name": repo_id, "id": repo_id})

    def info(self, type: str, id: str, revision: str | None = None) -> None:
        sha, files = self._files(type, id, revision or "main")
        repository = self.hub.repositories[type, id]
        siblings = [{"rfilename": path} for path in sorted(files)]
        author = id.split("/")[0]
        common = {"id": id, "author": author, "sha": sha, "private": repository.private, "gated": False, "disabled": False}
        self._reply({**common, "_id": hashlib.sha1(id.encode()).hexdigest()[:24], "tags": [], "downloads": 0, "siblings": siblings})

    def preupload(self, type: str, id: str, revision: str) -> None:
        self._writer_of(id)
        _, files = self._files(type, id, revision)
        answers = []
        for entry in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(entry["path"], entry["size"]) else "regular"
            known = files.get(entry["path"])
            oid = (known.sha256 if known.lfs else known.oid) if known else None
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._reply({"files": answers})

    def lfs_batch(self, id: str, prefix: str = "") -> None:
        self._writer_of(id)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.hub.lfs_objects:
                upload = {"href": f"{self.hub.url}/lfs-storage/{entry['oid']}"}
                verify = {"href": f"{self.hub.url}/{prefix or ''}{id}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise ApiError(400, "the content has another sha256")
        self.hub.lfs_objects[oid] = self.body
        self._reply({})

    def lfs_verify(self, id: str, prefix: str = "") -> None:
        self._writer_of(id)
        wanted = json.loads(self.body)
        content = self.hub.lfs_objects.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise ApiError(404, "LFS object not found")
        self._reply({})

    def commit(self, type: str, id: str, revision: str) -> None:
        self._writer_of(id)
        repository = self._repository(type, id)
        if revision not in repository.branches:
            raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[revision]])
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                content = self.hub.lfs_objects.get(value["oid"])
                if content is None:
                    raise ApiError(400, f"LFS pointer {value['oid']} points to a file that was not uploaded")
                files[value["path"]] = Blob(content, lfs=True)
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise ApiError(400, f"unknown operation {operation['key']}")
        sha = repository.commit(revision, files, message)
        self._reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "hookOutput": ""})

    def tree(self, type: str, id: str, revision: str, path: str = "") -> None:
        _, files = self._files(type, id, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        entries = [e for e in listing(files) if e["path"].startswith(prefix)]
        if path and not entries:
            raise ApiError(404, f"{path} does not exist", "EntryNotFound")
        self._reply([e for e in entries if recursive or "/" not in e["path"].removeprefix(prefix)])

    def paths_info(self, type: str, id: str, revision: str) -> None:
        _, files = self._files(type, id, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        self._reply([e for e in listing(files) if e["path"] in paths])

    def branch(self, type: str, id: str, branch: str) -> None:
        self._writer_of(id)
        repository = self._repository(type, id)
        if branch in repository.branches:
            raise ApiError(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        if (sha := repository.sha_of(start)) is None:
            raise ApiError(404, f"Invalid rev id: {start}", "RevisionNotFound")
        repository.branches[branch] = sha
        self._reply({})

    def refs(self, type: str, id: str) -> None:
        branches = self._repository(type, id).branches
        heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
        self._reply({"branches": heads, "tags": [], "converts": []})

    def resolve(self, id: str, rest: str, prefix: str | None = None) -> None:
        kind = "datasets" if prefix else "models"
        names = [n for n in [*self._repository(kind, id).branches, *self._repository(kind, id).commits] if rest.startswith(f"{n}/")]
        revision = max(names, key=len, default=rest.split("/")[0])
        sha, files = self._files(kind, id, revision)
        blob = files.get(rest.removeprefix(f"{revision}/"))
        headers: dict[str, str | None] = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob is None:
            self._reply({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{blob.sha256 if blob.lfs else blob.oid}"'
        headers |= {"ETag": etag, "X-Linked-ETag": etag, "X-Linked-Size": str(len(blob.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._reply(blob.content, 200, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob.content)), len(blob.content) - 1)
        if first > last:
            raise ApiError(416, "Range not satisfiable")
        content_range = f"bytes {first}-{last}/{len(blob.content)}"
        self._reply(blob.content[first : last + 1], 206, {**headers, "Content-Range": content_range})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            self._reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self._reply({"errors": [], "warnings": warnings})


_ROUTES = (
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"{_API}", _Handler.info),
    (("GET",), rf"{_API}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"{_API}/refs", _Handler.refs),
    (("POST",), rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"{_API}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (
        ("GET",),
        rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?",
        lambda self, **k: self.tree(**{**k, "path": k["path"] or ""}),
    ),
    (("POST",), rf"/(?P<prefix>datasets/)?{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), rf"/(?P<prefix>datasets/)?{_ID}\.git/info/lfs/verify", _Handler.lfs_verify),
    (("PUT",), r"/lfs-storage/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("GET", "HEAD"), rf"/(?P<prefix>datasets/)?{_ID}/resolve/(?P<rest>.+)", _Handler.resolve),
)
