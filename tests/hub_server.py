"""A Hugging Face Hub on this machine, kept in memory: what `huggingface_hub` asks of the real one, for tests to push to
and load from, to look into and to disturb.

As on the real one, large files are on another host, which takes no token: the Hub is 127.0.0.1, its storage localhost.
Not here: Xet (`environment` switches it off), pages of long lists, uploads in parts, names without an owner, pull
requests. Longer than three screens because it is one protocol: the state, then the endpoints as clients ask for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

#: What the Hub's first `.gitattributes` makes large, whatever its size.
LFS_SUFFIXES = (".arrow", ".bin", ".gguf", ".gz", ".h5", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".pth")
LFS_SUFFIXES += (".safetensors", ".tar", ".tgz", ".zip", ".png", ".jpg", ".jpeg")
_DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """A version of a file; `lfs` ones are kept in the storage."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}"]
        return "\n".join([*lines, ""]).encode()

    @cached_property
    def oid(self) -> str:
        """Of git's blob: the content's, or its pointer's."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return f'"{self.sha256 if self.lfs else self.oid}"'

    def listed(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {**entry, "lfs": lfs} if self.lfs else entry


class Commit(NamedTuple):
    id: str
    title: str
    message: str
    parent: str
    tree: dict[str, File]


class Repo:
    """A repository.

    Args:
        kind: "models", "datasets" or "spaces".
        id: "org/name".
        private: whether it is there for nobody without a token.

    Attributes:
        gated: whether downloads are refused, the token's owner not being on the list.
        details: further fields of its description, such as `pipeline_tag`.
        objects: what was uploaded to the storage, by SHA-256.
    """

    def __init__(self, kind: str, id: str, private: bool = False):
        self.kind, self.id, self.private, self.gated = kind, id, private, False
        self.details: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    @property
    def files(self) -> dict[str, bytes]:
        """Content of every file on the main branch."""
        return {path: file.content for path, file in sorted(self.at("main").tree.items())}

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or an id.

        Raises:
            Refusal: there is none.
        """
        name = revision.removeprefix("refs/heads/")
        commit = self.commits.get(self.branches.get(name) or self.tags.get(name) or name)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, branch: str, tree: dict[str, File], title: str, message: str = "") -> Commit:
        """Put a commit on a branch. Its id covers all of it: clients take the same id for the same files."""
        parent = self.branches.get(branch, "")
        content = repr((self.kind, self.id, parent, title, message, sorted((p, f.oid) for p, f in tree.items())))
        id = hashlib.sha1(content.encode()).hexdigest()
        self.commits[id] = Commit(id, title, message, parent, tree)
        self.branches[branch] = id
        return self.commits[id]


@dataclass
class Request:
    """What was asked, without the query; the status is 0 until it is answered."""

    method: str
    path: str
    status: int = 0


class Answer(NamedTuple):
    content: Any = b""
    status: int = 200
    headers: dict[str, str] | None = None


class Refusal(Exception):
    """An error as the Hub answers it.

    Args:
        status: of HTTP.
        message: for people.
        code: by which the client distinguishes errors.
        headers: further ones.
        fields: further ones of the body.
    """

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **fields: str):
        super().__init__(message)
        error_headers = {"X-Error-Message": message, "X-Error-Code": code}
        self.answer = Answer({"error": message, **fields}, status, {**error_headers, **(headers or {})})


@dataclass
class Fault:
    method: str = ""
    pattern: str = ""
    left: int = 0
    status: int | None = None
    cut: int | None = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server, running from the moment it is made until `stop`.

    Attributes:
        url: the endpoint.
        storage_url: where large files are.
        requests: all there were.
        repos: by kind ("models", "datasets", "spaces") and id.
        token: the one that is valid.
        lfs_size: files of more bytes are large whatever they are called.
    """

    def __init__(self, token: str = "dummy"):
        self.token, self.lfs_size = token, 10 * 2**20
        self.requests: list[Request] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.Lock()
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be unreachable from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | os.PathLike, **variables: str) -> dict[str, str]:
        """Variables of a process whose Hub this is; they are read when it imports `huggingface_hub`.

        Args:
            home: folder for all its caches; an empty one has nothing cached.
            variables: others to set.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(Path(home)), "HF_HUB_DISABLE_XET": "1"}
        # Without these the libraries go to other hosts, which a test must not.
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1,localhost"}
        return {**kept, **own, **variables}

    def add_repo(self, kind: str, id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository without a client, and commit files to it."""
        repo = self.repos[kind, id] = Repo(kind, id, private)
        tree = {path: File(content, self.is_lfs(path, content)) for path, content in (files or {}).items()}
        repo.objects = {file.sha256: file.content for file in tree.values() if file.lfs}
        if tree:
            repo.commit("main", tree, "add files")
        return repo

    def is_lfs(self, path: str, content: bytes, size: int | None = None) -> bool:
        """Whether a file is large, or binary, which here counts as large; `content` may be its start only."""
        size = len(content) if size is None else size
        return size > 0 and (path.endswith(LFS_SUFFIXES) or size > self.lfs_size or b"\0" in content)

    def disturb(
        self,
        method: str,
        pattern: str,
        times: int = 1,
        status: int | None = None,
        cut: int | None = None,
        content: bytes | None = None,
        **headers: str,
    ) -> None:
        """Let the next requests go wrong. A request takes the first fault that fits it; but for `status`, the server
        does what is asked and only the answer suffers.

        Args:
            method: of the requests.
            pattern: regular expression, found in their paths: "/commit/", "/resolve/.*README.md" or "^/storage/".
            times: how many requests.
            status: answer with this instead. Of those that a client repeats (429, 500, 503) it waits less long after
                the header `Retry_After="0"`.
            cut: close the connection after so many bytes of the answer's body; 0 closes it without an answer.
            content: answer with this body, the headers being those of the true one but for Content-Length.
            headers: add or replace these, "_" standing for "-", "" taking one out: `X_Linked_Size="7"`.
        """
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._faults.append(Fault(method, pattern, times, status, cut, content, names))

    def calm(self) -> None:
        """Forget what was still to go wrong."""
        self._faults.clear()

    def next_fault(self, method: str, path: str) -> Fault:
        """What is to go wrong with this request; an empty fault if nothing."""
        for fault in self._faults:
            if fault.left > 0 and fault.method == method and re.search(fault.pattern, path):
                fault.left -= 1
                return fault
        return Fault()


_ROUTES: list[tuple[str, re.Pattern, Callable]] = []
#: Of paths of the API and of files, and their groups: a kind and an id.
_API, _FILES = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"


def _route(method: str, pattern: str) -> Callable:
    def register(handle: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), handle))
        return handle

    return register


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # Headers and body in one packet: apart, they wait for an acknowledgement.
    body: bytes
    query: dict[str, list[str]]

    def log_message(self, *arguments) -> None:
        pass

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.body, self.query = self._read_body(), parse_qs(query)
        request = Request(self.command, path)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.next_fault(self.command, path)
            try:
                if fault.status is not None:
                    raise Refusal(fault.status, "out of order, the test wants it so")
                answer = self._in_range(self._answer(path))
            except Refusal as refusal:
                answer = refusal.answer
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                answer = Refusal(400, f"not what hub_server.py expects of a client: {error!r}").answer
            answer = self._disturbed(answer, fault)
            request.status = answer.status
        self._send(answer, fault.cut)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, path: str) -> Answer:
        in_storage = self.headers["Host"].startswith("localhost")
        method = "GET" if self.command == "HEAD" else self.command
        for routed, pattern, handle in _ROUTES:
            match = pattern.fullmatch(path)
            if routed == method and match and in_storage == path.startswith("/storage/"):
                return handle(self, *(None if group is None else unquote(group) for group in match.groups()))
        raise Refusal(404, f"{self.command} {self.path}: no such endpoint on this host")

    def _in_range(self, answer: Answer) -> Answer:
        """The part of a file that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or "Accept-Ranges" not in (answer.headers or {}):
            return answer
        size, (start, end) = len(answer.content), wanted.groups()
        first = int(start) if start else max(size - int(end), 0)
        last = min(int(end), size - 1) if start and end else size - 1
        if first >= size:
            raise Refusal(
                416, "the range begins behind the end of the file", headers={"Content-Range": f"bytes */{size}"}
            )
        part = {"Content-Range": f"bytes {first}-{last}/{size}"}
        return Answer(answer.content[first : last + 1], 206, {**answer.headers, **part})

    def _disturbed(self, answer: Answer, fault: Fault) -> Answer:
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        content = content if fault.content is None else fault.content
        length = {"Content-Length": str(len(content))}
        return Answer(content, answer.status, {**(answer.headers or {}), **length, **fault.headers})

    def _send(self, answer: Answer, cut: int | None) -> None:
        self.close_connection |= cut is not None
        if cut == 0:
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[:cut])

    # What is common to the endpoints.

    def _signed_in(self, needed: bool = False) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and given is None:
            raise Refusal(401, "Invalid username or password.")
        return given is not None

    def _repo(self, kind: str | None, id: str, write: bool = False) -> Repo:
        signed_in = self._signed_in(write)
        repo = self.hub.repos.get((kind or "models", id))
        if repo is None or (repo.private and not signed_in):
            # Without a token the answer does not say which of the two it is.
            raise Refusal(404 if signed_in else 401, "Repository not found", "RepoNotFound")
        return repo

    def _address(self, kind: str, id: str) -> str:
        return f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"

    # Making repositories.

    @_route("GET", "/api/agent-harnesses")
    def known_agents(self) -> Answer:
        """The client asks for it once a day, mostly when it has an error to colour."""
        return Answer({"standardEnvVars": [], "harnesses": {}})

    @_route("GET", "/api/whoami-v2")
    def who_am_i(self) -> Answer:
        self._signed_in(needed=True)
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Answer({"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": token})

    @_route("POST", "/api/repos/create")
    def create_repo(self) -> Answer:
        self._signed_in(needed=True)
        asked = json.loads(self.body)
        kind, id = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'user'}/{asked['name']}"
        if (kind, id) in self.hub.repos:
            # The client reads the address of this error, too.
            raise Refusal(409, f"You already created this repo: {id}", url=self._address(kind, id))
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.add_repo(kind, id, private=private)
        return Answer({"url": self._address(kind, id), "name": id, "id": id})

    @_route("POST", _API + "/(branch|tag)/([^/]+)")
    def make_ref(self, kind: str, id: str, what: str, name: str) -> Answer:
        repo, asked = self._repo(kind, id, write=True), json.loads(self.body)
        # A branch is in the address and its start in the body, a tag the other way round.
        name, start = (name, asked.get("startingPoint", "main")) if what == "branch" else (asked["tag"], name)
        refs = repo.branches if what == "branch" else repo.tags
        if name in refs:
            raise Refusal(409, f"Reference already exists: {name}")
        refs[name] = repo.at(start).id
        return Answer({})

    # Pushing.

    @_route("POST", "/api/validate-yaml")
    def validate_card(self) -> Answer:
        bare = {"type": "warning", "message": "empty or missing yaml metadata in repo card"}
        return Answer({"errors": [], "warnings": [] if json.loads(self.body)["content"].startswith("---") else [bare]})

    @_route("POST", _API + "/preupload/([^/]+)")
    def preupload(self, kind: str, id: str, revision: str) -> Answer:
        tree = self._repo(kind, id, write=True).at(revision).tree
        files = []
        for asked in json.loads(self.body)["files"]:
            path, there = asked["path"], tree.get(asked["path"])
            lfs = self.hub.is_lfs(path, base64.b64decode(asked["sample"]), asked["size"])
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            files[-1]["oid"] = there and there.etag.strip('"')
        return Answer({"files": files})

    @_route("POST", _FILES + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str | None, id: str) -> Answer:
        repo, objects = self._repo(kind, id, write=True), []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage_url}/storage/{repo.kind}/{id}/{asked['oid']}"}
            verify = {"href": f"{self._address(repo.kind, id)}.git/info/lfs/objects/verify"}
            actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, "authenticated": True, **({} if asked["oid"] in repo.objects else actions)})
        return Answer({"transfer": "basic", "objects": objects})

    @_route("PUT", r"/storage/([^/]+)/([^/]+/[^/]+)/(\w+)")
    def lfs_upload(self, kind: str, id: str, oid: str) -> Answer:
        self._without_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, f"what was sent is not {oid}")
        self.hub.repos[kind, id].objects[oid] = self.body
        return Answer(headers={"ETag": f'"{oid}"'})

    @_route("POST", _FILES + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, kind: str | None, id: str) -> Answer:
        repo, asked = self._repo(kind, id, write=True), json.loads(self.body)
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"object {asked['oid']} of {asked['size']} bytes was not uploaded")
        return Answer({})

    @_route("POST", _API + "/commit/([^/]+)")
    def commit(self, kind: str, id: str, revision: str) -> Answer:
        repo = self._repo(kind, id, write=True)
        head, *changes = (json.loads(line) for line in self.body.splitlines())
        parent = repo.at(revision)
        if head["key"] != "header" or head["value"].get("parentCommit", parent.id) != parent.id:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for change in changes:
            self._change(repo, tree, change["key"], change["value"])
        if revision not in repo.branches:
            raise Refusal(400, f"{revision} is no branch")
        made = repo.commit(revision, tree, head["value"]["summary"], head["value"].get("description", ""))
        commit_url = f"{self._address(repo.kind, id)}/commit/{made.id}"
        return Answer({"success": True, "commitOid": made.id, "commitUrl": commit_url})

    def _change(self, repo: Repo, tree: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(404, f"{path}: object {value['oid']} was not uploaded")
            tree[path] = File(repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone or (key == "deletedFile" and gone != [path]):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refusal(400, f"unknown change {key!r}")

    # Loading.

    @_route("GET", _API + "(?:/revision/([^/]+))?")
    def describe(self, kind: str, id: str, revision: str | None) -> Answer:
        repo = self._repo(kind, id)
        commit = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        facts = {"_id": repo.id, "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.id, "siblings": siblings}
        facts |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []}
        return Answer({**facts, "createdAt": _DATE, "lastModified": _DATE, "downloads": 0, "likes": 0, **repo.details})

    def _listed(self, commit: Commit, path: str, expanded: bool) -> dict[str, Any]:
        inside = sorted((p, f.oid) for p, f in commit.tree.items() if p.startswith(f"{path}/"))
        folder = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(repr(inside).encode()).hexdigest()}
        entry = commit.tree[path].listed(path) if path in commit.tree else folder
        return {**entry, "lastCommit": {"id": commit.id, "title": commit.title, "date": _DATE}} if expanded else entry

    @_route("GET", _API + "/tree/([^/]+)(?:/(.+))?")
    def list_tree(self, kind: str, id: str, revision: str, folder: str | None) -> Answer:
        commit = self._repo(kind, id).at(revision)
        recursive, expanded = (self.query.get(name) == ["true"] for name in ("recursive", "expand"))
        within, found = f"{folder.rstrip('/')}/" if folder else "", {}
        for path in sorted(commit.tree):
            if path.startswith(within):
                ends = [i for i, letter in enumerate(path) if letter == "/" and i >= len(within)] + [len(path)]
                found |= {path[:end]: None for end in (ends if recursive else ends[:1])}
        if within and not found:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer([self._listed(commit, path, expanded) for path in found])

    @_route("POST", _API + "/paths-info/([^/]+)")
    def list_paths(self, kind: str, id: str, revision: str) -> Answer:
        commit, asked = self._repo(kind, id).at(revision), parse_qs(self.body.decode())
        paths = [path.rstrip("/") for path in asked.get("paths", [])]
        there = [p for p in paths if p in commit.tree or any(name.startswith(f"{p}/") for name in commit.tree)]
        return Answer([self._listed(commit, path, asked.get("expand") == ["true"]) for path in there])

    @_route("GET", _FILES + "/resolve/([^/]+)/(.+)")
    def resolve(self, kind: str | None, id: str, revision: str, path: str) -> Answer:
        repo = self._repo(kind, id)
        if repo.gated:
            message = f"Access to {id} is restricted and you are not in the authorized list."
            raise Refusal(403 if self._signed_in() else 401, message, "GatedRepo")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.tree:
            # With the commit: the client remembers what it does not hold.
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        file = commit.tree[path]
        headers["ETag"] = file.etag
        if not file.lfs:
            return Answer(file.content, 200, {**headers, "Accept-Ranges": "bytes"})
        headers |= {"X-Linked-Etag": file.etag, "X-Linked-Size": str(len(file.content))}
        headers |= {"Location": f"{self.hub.storage_url}/storage/{repo.kind}/{id}/{file.sha256}"}
        return Answer(b"", 302, headers)

    @_route("GET", r"/storage/([^/]+)/([^/]+/[^/]+)/(\w+)")
    def lfs_download(self, kind: str, id: str, oid: str) -> Answer:
        self._without_token()
        content = self.hub.repos[kind, id].objects[oid]
        return Answer(content, 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _without_token(self) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "the Hub's token was sent to its storage")


__all__ = ["File", "HubServer", "Repo", "Request"]
