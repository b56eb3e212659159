"""A small Hugging Face Hub on loopback, for tests.

It speaks the part of the Hub's HTTP API that huggingface_hub, transformers and datasets use for repositories of models
and datasets: creating them, reading them at any revision, and uploading through git LFS. As on the real Hub, large
files live on a second origin (`/lfs-store/...`, another port) that is reached through signed URLs and never sees a
token. A repository is called what it is called in URLs: `"alice/model"`, `"datasets/alice/corpus"`.

Not covered, and answered with 501: spaces, pull requests, gated repositories and Xet storage. Whether a client uploads
through Xet is decided by the client alone, so run it with `HubServer.env`, which disables it. The dataset viewer, of
which `datasets` asks for features it can do without, is another server, and is not there.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.message import Message
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


REGULAR_LIMIT = 10_000_000  # bytes; a larger file is stored with LFS whatever its name
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)
GITATTRIBUTES = re.sub(r"(\S+)\s*", r"\1 filter=lfs diff=lfs merge=lfs -text\n", LFS_PATTERNS).encode()
PREFIXES = {"model": "", "dataset": "datasets/"}  # of a repository's name, by its type
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class HubError(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        message: Text for the user, sent in the body and as `X-Error-Message`.
        code: Value of `X-Error-Code`, from which the client chooses its exception.
        headers: More headers.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.response = json_response({"error": message}, status=status)
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.response.headers.update({"X-Error-Message": line, **(headers or {})})
        if code is not None:
            self.response.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Request:
    """One HTTP request, read to its end. `host` names the origin that received it: `"hub"` or `"store"`."""

    host: str
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes

    def json(self) -> Any:
        """The body, parsed as JSON."""
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to a true value."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """One HTTP answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_response(data: Any, status: int = 200) -> Response:
    """An answer with a JSON body."""
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def content_response(data: bytes, request: Request, headers: Mapping[str, str]) -> Response:
    """An answer with the content of a file, or the part of it that a `Range` header asks for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Response(200, data, headers)
    first, last = asked.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(206, data[start:stop], headers)


def git_oid(kind: str, data: bytes) -> str:
    """The id git gives to an object."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of one file. If `lfs`, git only holds a pointer to it."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The id of the content in the LFS store."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The id of the git object: the content, or the pointer to it."""
        return git_oid("blob", self.pointer if self.lfs else self.data)

    @property
    def pointer(self) -> bytes:
        """The text that git holds in place of an LFS file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()


@dataclass(frozen=True)
class Commit:
    """One commit, with its own snapshot of the files."""

    sha: str
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]

    @cached_property
    def card(self) -> dict[str, Any]:
        """The metadata of the card."""
        text = self.files["README.md"].data.decode() if "README.md" in self.files else ""
        return read_front_matter(text) or {}


class Repo:
    """A repository: commits, branches and tags. It starts with a commit holding `.gitattributes`.

    Args:
        repo_id: Name, as in `"alice/model"` or `"datasets/alice/corpus"`.
        private: Whether only the owner can see it.
    """

    def __init__(self, repo_id: str, private: bool):
        self.id = repo_id
        self.name = repo_id.removeprefix(PREFIXES["dataset"])  # as the API gives it
        self.is_model = self.name == repo_id
        self.owner = self.name.split("/")[0]
        self.private = private
        self.branches: dict[str, list[Commit]] = {"main": []}  # name -> history, oldest first
        self.tags: dict[str, list[Commit]] = {}
        self.add_commit("main", "initial commit", "", "system", {".gitattributes": Blob(GITATTRIBUTES)})

    def add_commit(self, branch: str, title: str, description: str, author: str, files: Mapping[str, Blob]) -> Commit:
        """Add a commit to a branch.

        Args:
            branch: An existing branch.
            title: First line of the message.
            description: The rest of the message.
            author: Name of the user.
            files: Every file of the new snapshot.

        Returns:
            The commit. Its sha and its date depend on the history only, not on the clock.
        """
        history = self.branches[branch]
        parent = history[-1].sha if history else ""
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = git_oid("commit", json.dumps([self.id, parent, title, description, author, tree]).encode())
        date = datetime(2025, 1, 1) + timedelta(minutes=len(history))
        stamp = date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        history.append(Commit(sha, title, description, author, stamp, dict(files)))
        return history[-1]

    def history(self, rev: str) -> list[Commit]:
        """The commits up to a branch, a tag or a (possibly abbreviated) sha, oldest first."""
        refs = {**self.tags, **self.branches}
        if rev in refs:
            return refs[rev]
        for history in refs.values():
            for index, commit in enumerate(history):
                if len(rev) >= 7 and commit.sha.startswith(rev):
                    return history[: index + 1]
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def at(self, rev: str) -> Commit:
        """The commit that a branch, a tag or a sha stands for."""
        return self.history(rev)[-1]


def read_front_matter(text: str) -> dict[str, Any] | None:
    """The metadata at the top of a card.

    Args:
        text: Content of a README.md.

    Returns:
        The metadata, or None if the card has none.

    Raises:
        HubError: If it is not a YAML mapping.
    """
    match = FRONT_MATTER.match(text)
    if match is None:
        return None
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid YAML metadata: {error}") from None
    if not isinstance(data, dict):
        raise HubError(400, "Invalid YAML metadata: not a mapping")
    return data


def is_lfs(path: str, size: int, gitattributes: str) -> bool:
    """Whether a file belongs in LFS: it is large, or `.gitattributes` says so."""
    patterns = [line.split()[0] for line in gitattributes.splitlines() if "filter=lfs" in line]
    name = path.rsplit("/", 1)[-1]
    return size > REGULAR_LIMIT or any(fnmatch(path if "/" in pattern else name, pattern) for pattern in patterns)


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file, as tree listings show it."""
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def folder_entry(path: str, files: Mapping[str, Blob]) -> dict[str, Any]:
    """A folder, as tree listings show it."""
    inside = sorted((name, blob.oid) for name, blob in files.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "oid": git_oid("tree", json.dumps(inside).encode()), "size": 0, "path": path}


def sibling_entry(path: str, blob: Blob, details: bool) -> dict[str, Any]:
    """A file, as repository info shows it."""
    entry: dict[str, Any] = {"rfilename": path}
    if details:
        entry |= {"size": len(blob.data), "blobId": blob.oid}
    if details and blob.lfs:
        entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def list_tree(files: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders inside a folder.

    Args:
        files: The files of a snapshot.
        folder: Path of the folder, empty for the root.
        recursive: Whether to go into its folders.

    Returns:
        Entries sorted by path.
    """
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path, blob in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            if parent not in entries:
                entries[parent] = folder_entry(parent, files)
        if recursive or len(parts) == 1:
            entries[path] = file_entry(path, blob)
    return [entries[path] for path in sorted(entries)]


@dataclass(frozen=True)
class Route:
    """What answers a request. `access` is `"open"`, `"user"`, `"read"`, `"write"` or `"signed"`."""

    host: str
    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    access: str
    view: Callable[..., Response]


ROUTES: list[Route] = []
PARTS = {
    "repo": r"(?:datasets/)?[\w.-]+/[\w.-]+",
    "rev": "[^/]+",
    "name": "[^/]+",
    "oid": "[0-9a-f]{64}",
    "path": ".+",
}


def route(methods: str, pattern: str, access: str, host: str = "hub") -> Callable[[Callable], Callable]:
    """Register a method of `HubServer` for some paths.

    Args:
        methods: HTTP methods, separated by spaces.
        pattern: Path, with the `PARTS` in braces. Their values become keyword arguments of the method; for access
            `"read"` and `"write"`, `repo` becomes a `Repo` the user may read or write. Access `"user"` adds `user`.
            Below `/api/`, a model is `models/{repo}`.
        access: Who may ask: anyone, a user with a token, a user with access to the repository, or the holder of a
            signed URL.
        host: The origin that has the path.

    Returns:
        A decorator.
    """
    pattern = pattern.replace(".", r"\.").replace("/api/{repo}", "/api/(?:models/|(?=datasets/)){repo}")
    regex = re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS[part[1]]})", pattern)

    def register(view: Callable) -> Callable:
        ROUTES.append(Route(host, tuple(methods.split()), re.compile(regex), access, view))
        return view

    return register


class HubServer:
    """A Hugging Face Hub at `endpoint`, while the context is open.

    Args:
        users: User names by token. A user may write to the repositories under their own name.
        page_size: Number of entries per page of a listing.
        part_size: LFS objects larger than this many bytes are uploaded in parts.

    Attributes:
        endpoint: Base URL, the value for `HF_ENDPOINT`.
        requests: `(method, path)` of the requests seen, LFS store included.
        bytes_sent: Bytes of content sent, by path.
        unhandled: Messages about requests that no route answers, or that made the server fail.
    """

    def __init__(self, users: Mapping[str, str], page_size: int = 1000, part_size: int = 50_000_000):
        self.users = dict(users)
        self.page_size = page_size
        self.part_size = part_size
        self.endpoint = ""
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent: Counter[str] = Counter()
        self.unhandled: list[str] = []
        self._repos: dict[str, Repo] = {}
        self._objects: dict[tuple[str, str], bytes] = {}  # (repo id, sha256) -> content
        self._parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._listeners: list[_Listener] = []

    def __enter__(self) -> "HubServer":
        self._listeners = [_Listener("hub", self._answer), _Listener("store", self._answer)]
        self.endpoint, self._store = (listener.url for listener in self._listeners)
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.stop()

    def env(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """Environment variables for a subprocess that is to use this Hub, and no other.

        Args:
            home: Folder for the client's cache and settings.
            token: Token to use, None for an anonymous client.

        Returns:
            Variables to add to the environment.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def run(self, *command: str, home: str | Path, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command that uses this Hub through the environment only.

        Args:
            command: Arguments of a new, isolated Python.
            home: Folder for the client's cache and settings.
            token: Token to use, None for an anonymous client.

        Returns:
            The process, ended.
        """
        env = {**os.environ, **self.env(home, token)}
        return subprocess.run([sys.executable, "-I", *command], env=env, capture_output=True, text=True)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository.

        Args:
            repo_id: Name of the repository.
            revision: Branch, tag or commit sha.

        Returns:
            Contents by path.
        """
        with self._lock:
            return {path: blob.data for path, blob in self._repos[repo_id].at(revision).files.items()}

    # ------------------------------------------------------------------------------------------------ dispatching

    def _answer(self, request: Request) -> Response:
        with self._lock:
            self.requests.append((request.method, request.path))
            response = self._try(request)
            if request.method != "HEAD":
                self.bytes_sent[request.path] += len(response.body)
            return response

    def _try(self, request: Request) -> Response:
        try:
            return self._dispatch(request)
        except HubError as error:
            return error.response
        except Exception:
            return self._not_implemented(f"{request.method} {request.path} failed: {traceback.format_exc()}")

    def _dispatch(self, request: Request) -> Response:
        for candidate in ROUTES:
            match = candidate.pattern.fullmatch(request.path)
            if match and candidate.host == request.host and request.method in candidate.methods:
                values = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                return candidate.view(self, request, **self._authorize(candidate.access, request, values))
        return self._not_implemented(f"no route for {request.method} {request.path} on the {request.host}")

    def _not_implemented(self, message: str) -> Response:
        self.unhandled.append(message)
        return json_response({"error": f"hub_server: {message}"}, status=501)

    def _authorize(self, access: str, request: Request, values: dict[str, Any]) -> dict[str, Any]:
        if access == "signed":
            self._check_signature(request)
        elif access != "open":
            user = self._user(request)
            if access == "user" and user is None:
                raise HubError(401, "Invalid username or password.")
            if access == "user":
                values["user"] = user
            else:
                values["repo"] = self._repo(values["repo"], user, write=access == "write")
        return values

    def _user(self, request: Request) -> str | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_id: str, user: str | None, write: bool) -> Repo:
        repo = self._repos.get(repo_id)
        hidden = repo is None or (repo.private and repo.owner != user)
        if user is None and (hidden or write):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and repo.owner != user:
            raise HubError(403, f"Forbidden: {user} has no write access to {repo_id}")
        return repo

    def _sign(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()

    def _signed_url(self, base: str, method: str, path: str) -> str:
        return f"{base}{path}?signature={self._sign(method, path)}"

    def _check_signature(self, request: Request) -> None:
        if "Authorization" in request.headers:
            raise HubError(400, "A signed URL must be used without a token")
        if request.query.get("signature") != [self._sign(request.method, request.path)]:
            raise HubError(403, "SignatureDoesNotMatch")

    def _page(self, request: Request, entries: list[Any]) -> Response:
        start = int(request.query.get("cursor", ["0"])[0])
        response = json_response(entries[start : start + self.page_size])
        if start + self.page_size < len(entries):
            query = "&".join(f"{name}={values[0]}" for name, values in request.query.items() if name != "cursor")
            url = f"{self.endpoint}{request.path}?{query}&cursor={start + self.page_size}"
            response.headers["Link"] = f'<{url}>; rel="next"'
        return response

    # --------------------------------------------------------------------------------------------- users and repos

    @route("GET", "/api/agent-harnesses", "open")
    def _agent_harnesses(self, request: Request) -> Response:
        return json_response({"standardEnvVars": [], "harnesses": {}})

    @route("HEAD", "/api/telemetry/{path}", "open")
    def _telemetry(self, request: Request, path: str) -> Response:
        return Response()

    @route("GET", "/api/whoami-v2", "user")
    def _whoami(self, request: Request, user: str) -> Response:
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return json_response({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    @route("POST", "/api/repos/create", "user")
    def _create_repo(self, request: Request, user: str) -> Response:
        asked = request.json()
        kind, owner = asked.get("type") or "model", asked.get("organization") or user
        if kind not in PREFIXES:
            return self._not_implemented(f"repositories of type {kind}")
        repo_id = f"{PREFIXES[kind]}{owner}/{asked['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": f"{owner}/{asked['name']}"}
        if owner != user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if repo_id in self._repos:
            return json_response({"error": f"You already created this {kind} repo", **answer}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._repos[repo_id] = Repo(repo_id, private)
        return json_response(answer)

    @route("DELETE", "/api/repos/delete", "user")
    def _delete_repo(self, request: Request, user: str) -> Response:
        asked = request.json()
        prefix, owner = PREFIXES[asked.get("type") or "model"], asked.get("organization") or user
        repo = self._repo(f"{prefix}{owner}/{asked['name']}", user, write=True)
        del self._repos[repo.id]
        self._objects = {key: data for key, data in self._objects.items() if key[0] != repo.id}
        return Response()

    @route("POST", "/api/validate-yaml", "open")
    def _validate_yaml(self, request: Request) -> Response:
        plain = "text/plain" in request.headers.get("Accept", "")
        try:
            card = read_front_matter(request.json()["content"])
        except HubError as error:
            if plain:
                return Response(400, str(error).encode(), {"Content-Type": "text/plain"})
            return json_response({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_response({"errors": [], "warnings": warnings})

    # ----------------------------------------------------------------------------------------------------- reading

    @route("GET", "/api/{repo}", "read")
    @route("GET", "/api/{repo}/revision/{rev}", "read")
    def _info(self, request: Request, repo: Repo, rev: str = "main") -> Response:
        commit = repo.at(rev)
        card = commit.card
        bases = card.get("base_model") or []
        tags = [f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases)]
        info = {
            "id": repo.name,
            "author": repo.owner,
            "sha": commit.sha,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "createdAt": repo.branches["main"][0].date,
            "lastModified": commit.date,
            "downloads": 0,
            "likes": 0,
            "tags": [*(card.get("tags") or []), *tags],
            "cardData": card,
            "siblings": [sibling_entry(*item, request.flag("blobs")) for item in sorted(commit.files.items())],
        }
        if repo.is_model:
            info |= {"library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
        wanted = {"id", *request.query["expand"]} if "expand" in request.query else set(info)
        return json_response({key: value for key, value in info.items() if key in wanted})

    @route("GET", "/api/{repo}/tree/{rev}", "read")
    @route("GET", "/api/{repo}/tree/{rev}/{path}", "read")
    def _tree(self, request: Request, repo: Repo, rev: str, path: str = "") -> Response:
        entries = list_tree(repo.at(rev).files, path.strip("/"), request.flag("recursive"))
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return self._page(request, entries)

    @route("POST", "/api/{repo}/paths-info/{rev}", "read")
    def _paths_info(self, request: Request, repo: Repo, rev: str) -> Response:
        files = repo.at(rev).files
        entries = {entry["path"]: entry for entry in list_tree(files, "", recursive=True)}
        asked = parse_qs(request.body.decode()).get("paths", [])
        return json_response([entries[path] for path in asked if path in entries])

    @route("GET", "/api/{repo}/commits/{rev}", "read")
    def _commits(self, request: Request, repo: Repo, rev: str) -> Response:
        return self._page(
            request,
            [
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": commit.date,
                }
                for commit in reversed(repo.history(rev))
            ],
        )

    @route("GET", "/api/{repo}/refs", "read")
    def _refs(self, request: Request, repo: Repo) -> Response:
        def entries(kind: str, refs: Mapping[str, list[Commit]]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": history[-1].sha}
                for name, history in refs.items()
            ]

        refs = {"branches": entries("heads", repo.branches), "tags": entries("tags", repo.tags)}
        return json_response({**refs, "converts": [], "pullRequests": []})

    @route("GET HEAD", "/{repo}/resolve/{rev}/{path}", "read")
    def _resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Response:
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{blob.oid}"'
        if not blob.lfs:
            return content_response(blob.data, request, headers)
        headers["X-Linked-Etag"] = f'"{blob.sha256}"'
        headers["X-Linked-Size"] = str(len(blob.data))
        headers["Location"] = self._signed_url(self._store, "GET", f"/lfs-store/{repo.id}/{blob.sha256}")
        return Response(302, b"Found. Redirecting to the LFS store", headers)

    # --------------------------------------------------------------------------------------------------- uploading

    @route("POST", "/api/{repo}/branch/{name}", "write")
    def _create_branch(self, request: Request, repo: Repo, name: str) -> Response:
        if name in repo.branches:
            raise HubError(409, f"Reference {name} already exists")
        repo.branches[name] = list(repo.history(request.json().get("startingPoint", "main")))
        return Response(201)

    @route("DELETE", "/api/{repo}/branch/{name}", "write")
    def _delete_branch(self, request: Request, repo: Repo, name: str) -> Response:
        if name not in repo.branches:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        if name == "main":
            raise HubError(403, "Cannot delete the main branch")
        del repo.branches[name]
        return Response()

    @route("POST", "/api/{repo}/tag/{rev}", "write")
    def _create_tag(self, request: Request, repo: Repo, rev: str) -> Response:
        name = request.json()["tag"]
        if name in repo.tags:
            raise HubError(409, f"Tag {name} already exists")
        repo.tags[name] = list(repo.history(rev))
        return Response(201)

    @route("DELETE", "/api/{repo}/tag/{name}", "write")
    def _delete_tag(self, request: Request, repo: Repo, name: str) -> Response:
        if repo.tags.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return Response()

    @route("POST", "/api/{repo}/preupload/{rev}", "write")
    def _preupload(self, request: Request, repo: Repo, rev: str) -> Response:
        files = repo.at(rev).files
        attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
        answers = []
        for file in request.json()["files"]:
            path, old = file["path"], files.get(file["path"])
            mode = "lfs" if is_lfs(path, file["size"], attributes) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if old is not None:
                answer["oid"] = old.sha256 if old.lfs else old.oid
            answers.append(answer)
        return json_response({"files": answers})

    @route("POST", "/{repo}.git/info/lfs/objects/batch", "write")
    def _lfs_batch(self, request: Request, repo: Repo) -> Response:
        asked = request.json()
        in_parts = "multipart" in asked.get("transfers", [])
        objects = [self._lfs_object(repo, item["oid"], item["size"], in_parts) for item in asked["objects"]]
        return json_response({"objects": objects})

    def _lfs_object(self, repo: Repo, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if (repo.id, oid) in self._objects:
            return answer
        verify = {"href": f"{self.endpoint}/{repo.id}.git/info/lfs/verify"}
        path = f"/lfs-store/{repo.id}/{oid}"
        upload: dict[str, Any] = {"href": self._signed_url(self._store, "PUT", path)}
        if in_parts and size > self.part_size:
            upload["href"] = self._signed_url(self.endpoint, "POST", f"/api/complete_multipart/{repo.id}/{oid}")
            count = -(-size // self.part_size)
            urls = {f"{n:05}": self._signed_url(self._store, "PUT", f"{path}/{n:05}") for n in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(self.part_size), **urls}
        return {**answer, "actions": {"upload": upload, "verify": verify}}

    @route("POST", "/{repo}.git/info/lfs/verify", "write")
    def _lfs_verify(self, request: Request, repo: Repo) -> Response:
        asked = request.json()
        if len(self._objects.get((repo.id, asked["oid"]), b"")) != asked["size"]:
            raise HubError(404, f"LFS object {asked['oid']} of {asked['size']} bytes not found")
        return Response()

    @route("POST", "/api/{repo}/commit/{rev}", "write")
    def _commit(self, request: Request, repo: Repo, rev: str) -> Response:
        if request.flag("create_pr"):
            return self._not_implemented(f"pull requests, asked for on {repo.id}")
        if rev not in repo.branches:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head, *operations = [json.loads(line) for line in request.body.splitlines()]
        message, parent = head["value"], repo.at(rev)
        if not parent.sha.startswith(message.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(repo, files, operation["key"], operation["value"])
        if "README.md" in files:
            read_front_matter(files["README.md"].data.decode())
        commit = repo.add_commit(rev, message["summary"], message.get("description", ""), repo.owner, files)
        url = f"{self.endpoint}/{repo.id}/commit/{commit.sha}"
        return json_response({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, repo: Repo, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if (repo.id, value["oid"]) not in self._objects:
                raise HubError(400, f"{path} points to LFS object {value['oid']}, which was never uploaded")
            files[path] = Blob(self._objects[repo.id, value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            prefix = f"{path.rstrip('/')}/"
            gone = [name for name in files if (name.startswith(prefix) if key == "deletedFolder" else name == path)]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise ValueError(f"unknown operation {key}")

    # --------------------------------------------------------------------------------------------------- LFS store

    def _keep_object(self, repo_id: str, oid: str, data: bytes) -> Response:
        actual = hashlib.sha256(data).hexdigest()
        if actual != oid:
            raise HubError(400, f"LFS object {oid} was sent with other content, of sha256 {actual}")
        self._objects[repo_id, oid] = data
        return Response()

    @route("PUT", "/lfs-store/{repo}/{oid}", "signed", host="store")
    def _put_object(self, request: Request, repo: str, oid: str) -> Response:
        return self._keep_object(repo, oid, request.body)

    @route("PUT", "/lfs-store/{repo}/{oid}/{name}", "signed", host="store")
    def _put_part(self, request: Request, repo: str, oid: str, name: str) -> Response:
        self._parts.setdefault((repo, oid), {})[int(name)] = request.body
        return Response(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("POST", "/api/complete_multipart/{repo}/{oid}", "signed")
    def _complete_multipart(self, request: Request, repo: str, oid: str) -> Response:
        parts = self._parts.pop((repo, oid), {})
        data = b"".join(parts.get(part["partNumber"], b"") for part in request.json()["parts"])
        return self._keep_object(repo, oid, data)

    @route("GET", "/lfs-store/{repo}/{oid}", "signed", host="store")
    def _get_object(self, request: Request, repo: str, oid: str) -> Response:
        return content_response(self._objects[repo, oid], request, {"ETag": f'"{oid}"'})


class _Handler(BaseHTTPRequestHandler):
    """Reads a request to its end, then answers it. One request per connection, so that stopping never waits."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: "_Listener"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.server.host, self.command, url.path, parse_qs(url.query), self.headers, body)
        response = self.server.answer(request)
        self.send_response(response.status)
        headers = {"Content-Length": str(len(response.body)), "Connection": "close", **response.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class _Listener(ThreadingHTTPServer):
    """One origin, served from its own thread as soon as it is made."""

    daemon_threads = False  # so that closing joins the threads
    request_queue_size = 128

    def __init__(self, host: str, answer: Callable[[Request], Response]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = host
        self.answer = answer
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """Stop serving, and wait for the requests under way."""
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing when a client hangs up."""
