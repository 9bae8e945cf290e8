"""A hub on this machine: the HTTP endpoints that huggingface_hub's client calls, with repositories in memory.

Uploads go by plain LFS (the client with HF_HUB_DISABLE_XET=1). Refusals carry the codes and headers of the real hub.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    """Files by path, and for each commit its title and the files after it."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Return the files at a commit's hash or on the main branch; None for another revision."""
        if revision == "main":
            return self.files
        return next((files for number, (_, files) in enumerate(self.commits) if _hash(number) == revision), None)

    @property
    def head(self) -> str:
        return _hash(len(self.commits) - 1)


class FakeHub:
    """The server, on a thread of its own.

    Attributes:
        endpoint: what HF_ENDPOINT has to be.
        repositories: by name, such as "tester/model".
        failures: `(method, pattern of the path, status)`, each answered once with that status.
        requests: `(method, path, status)` of all answered requests.
    """

    def __init__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.lock = Lock()
        self.reset()
        Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self):
        """Forget everything."""
        self.repositories, self.blobs, self.failures, self.requests = {}, {}, [], []


class _Refusal(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self):
        hub, self.path_only = self.server.hub, unquote(urlsplit(self.path).path)
        body = self._body()
        with hub.lock:
            try:
                for failure in hub.failures:
                    method, pattern, status = failure
                    if self.command == method and re.search(pattern, self.path_only):
                        hub.failures.remove(failure)
                        raise _Refusal(status, "a failure to order")
                status, headers, content = self._route(body)
            except _Refusal as refusal:
                status, headers = refusal.status, {"X-Error-Message": refusal.message}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                content = {"error": refusal.message, "errors": [{"message": refusal.message}]}
            hub.requests.append((self.command, self.path_only, status))
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _route(self, body):
        hub = self.server.hub
        for method, pattern, answer in (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/(\w+)", self._lfs_upload),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", self._commit),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+?)(?:/revision/([^/]+))?", self._info),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)(?:/.*)?", self._tree),
            ("HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("GET", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if self.command == method and (match := re.fullmatch(pattern, self.path_only)):
                return answer(hub, body, *match.groups())
        raise _Refusal(404, f"the fake hub has no {self.command} {self.path_only}", "EntryNotFound")

    def _need_write(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (READ_TOKEN, WRITE_TOKEN):
            raise _Refusal(401, "Invalid credentials in Authorization header" if token else "Unauthorized")
        if token == READ_TOKEN:
            raise _Refusal(403, "You don't have the rights to write with this token")

    def _repository(self, name):
        if name not in self.server.hub.repositories:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.server.hub.repositories[name]

    def _files(self, name, revision):
        files = self._repository(name).at(revision or "main")
        if files is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    def _whoami(self, hub, body):
        return 200, {}, {"type": "user", "name": USER, "orgs": []}

    def _create(self, hub, body):
        self._need_write()
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace of {name!r}")
        exists = name in hub.repositories
        hub.repositories.setdefault(name, Repository())
        return 409 if exists else 200, {}, {"url": f"{hub.endpoint}/{name}", "name": name}

    def _validate(self, hub, body):
        card = json.loads(body)["content"]
        metadata = yaml.safe_load(card.split("---\n")[1])
        for name in ("base_model", "datasets"):
            values = metadata.get(name, [])
            for value in [values] if isinstance(values, str) else values:
                if not MODEL_ID.fullmatch(value):
                    raise _Refusal(400, f'"{name}" with value "{value}" is not valid.')
        for result in metadata["model-index"][0]["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                raise _Refusal(400, '"model-index[0].results" needs a task and a dataset')
            for metric in result["metrics"]:
                if not isinstance(metric["value"], int | float):
                    raise _Refusal(400, '"model-index[0].results[].metrics[].value" must be a number')
        return 200, {}, {"errors": [], "warnings": []}

    def _preupload(self, hub, body, name, revision):
        self._need_write()
        self._files(name, revision)
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".bin", ".pt", ".safetensors")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {}, {"files": answers}

    def _lfs_batch(self, hub, body, name):
        self._need_write()
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in hub.blobs:
                wanted["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}
        return 200, {}, {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, hub, body, digest):
        if hashlib.sha256(body).hexdigest() != digest:
            raise _Refusal(400, "The content does not have the announced SHA-256")
        hub.blobs[digest] = body
        return 200, {}, {}

    def _commit(self, hub, body, name, revision):
        self._need_write()
        repository = self._repository(name)
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        repository.files = files
        repository.commits.append((lines[0]["value"]["summary"], files))
        return 200, {}, {"commitUrl": f"{hub.endpoint}/{name}/commit/{repository.head}", "commitOid": repository.head}

    def _info(self, hub, body, name, revision):
        files = self._files(name, revision)
        siblings = [{"rfilename": path} for path in files]
        head = self._repository(name).head
        return 200, {}, {"id": name, "sha": head, "siblings": siblings, "tags": [], "private": False, "downloads": 0}

    def _tree(self, hub, body, name, revision):
        files = self._files(name, revision)
        return 200, {}, [{"type": "file", "path": p, "size": len(x), "oid": _digest(x)} for p, x in files.items()]

    def _resolve(self, hub, body, name, revision, path):
        files = self._files(name, revision)
        commit = {"X-Repo-Commit": self._repository(name).head if revision == "main" else revision}
        if path not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        return 200, {**commit, "ETag": f'"{_digest(files[path])}"'}, files[path]


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _hash(number):
    """Return the hash of the commit of that number."""
    return hashlib.sha1(str(number).encode()).hexdigest()
