"""A hub on this machine: what huggingface_hub asks for when it downloads, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories by name, each with its commits, the newest last.

    Attributes:
        requests: method and path of all that was asked.
        gated: repositories that nobody may read.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.endpoint = ""

    def upload(self, repo: str, folder: Path, within: str = "", branch: str = "main") -> str:
        """Put a folder's files into a repository, and return the commit."""
        known = self.repos.setdefault(repo, {})
        before = known.get(self.branches.setdefault(repo, {}).get(branch, ""), {})
        read = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        files = {**before, **{f"{within}{name}": content for name, content in read.items()}}
        told = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())})
        commit = hashlib.sha1(f"{repo} {branch} {told}".encode()).hexdigest()
        known[commit] = files
        self.branches[repo][branch] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        of_api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if of_api else parts[:2]), parts[4:] if of_api else parts[2:]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.branches[repo].get(revision, revision)
        files = self.repos[repo].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if of_api and rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if of_api:
            info = {"id": repo, "sha": commit, "private": False, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        content = files.get("/".join(rest[2:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content


@contextmanager
def serving(hub: Hub, cache: Path) -> Iterator[Hub]:
    """The hub in the place of the real one, with an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        constants = "huggingface_hub.constants"
        patch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
        patch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        patch.setattr(f"{constants}.HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.setenv("HF_HUB_OFFLINE", "0")
        yield hub
    server.shutdown()
    server.server_close()
