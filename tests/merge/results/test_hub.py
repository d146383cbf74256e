"""A merge is pushed to a hub: a server that speaks what huggingface_hub asks of one, and keeps what it is sent."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import served_cases
import yaml

import nsc_merge
from nsc_merge.results.hub import push, pushed_files

REPO = "someone/merged"


class Hub(BaseHTTPRequestHandler):
    """Repositories by name: whether each is private, its files, and how it was asked."""

    def _answer(self, status: int, document: dict) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name, _, place = self.path[1:].partition("/resolve/")
            content = self.server.repos[name]["files"][place.split("/", 1)[1]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"etag"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")
            return
        name = self.path.removeprefix("/api/models/").split("/revision/")[0]
        if name not in self.server.repos:
            self._answer(404, {"error": "Repository not found"})
            return
        repo = self.server.repos[name]
        held = [{"rfilename": file} for file in repo["files"]]
        known = {"id": name, "private": repo["private"], "sha": "0" * 40, "tags": [], "siblings": held}
        self._answer(200, known)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.headers["Authorization"] != "Bearer hf_writes":
            self._answer(401 if "wrong" in self.headers["Authorization"] else 403, {"error": "no"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(200, {"files": [{"path": one["path"], **modes} for one in json.loads(body)["files"]]})
        elif "/branch/" in self.path:
            self._answer(200, {})
        else:
            self._commit(body)

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        known = name in self.server.repos
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repos.setdefault(name, {"private": private, "files": {}})
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}"})

    def _commit(self, body: bytes) -> None:
        name, revision = self.path.removeprefix("/api/models/").split("/commit/")
        sent = [json.loads(line) for line in body.splitlines()]
        self.server.repos[name]["files"] |= {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in sent if one["key"] == "file"
        }
        for one in sent:
            if one["key"] == "deletedFile":
                del self.server.repos[name]["files"][one["value"]["path"]]
        self.server.commits.append((name, revision, sent[0]["value"]["summary"]))
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1"})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    made = HTTPServer(("127.0.0.1", 0), Hub)
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def hub(server, monkeypatch):
    server.repos, server.asked, server.commits = {}, [], []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
    files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    return server


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    place = tmp_path_factory.mktemp("machine")
    base = served_cases.write_base("vit", place / "base")
    adapters = served_cases.write_adapters(base, place, "vit", modules_to_save=["classifier"])
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic")
    return place, result


@pytest.fixture
def saved(merged, tmp_path):
    """The folder of a merge, with files of its user in it."""
    out = merged[1].save(tmp_path / "out", ["lora", "model"], head="one")
    for name in ("notes.txt", "model/secret.json", "heads/mine.bin"):
        (out / name).write_text("mine")
    return out


def test_what_the_save_wrote_goes_up_and_nothing_else(saved, hub):
    assert push(saved, REPO) == f"{hub.url}/{REPO}"
    files = hub.repos[REPO]["files"]
    model = {file.name for file in (saved / "model").iterdir()} - {"secret.json"}
    lora = {f"lora/{file.name}" for file in (saved / "lora").iterdir()}
    heads = {f"heads/{task}.{ending}" for task in ("one", "two") for ending in ("json", "safetensors")}
    assert set(files) == {"README.md", "recipe.yaml", "coefficients.json", *model, *lora, *heads}
    # The model lies at the top, byte by byte.
    assert files["model.safetensors"] == (saved / "model" / "model.safetensors").read_bytes()
    assert files["preprocessor_config.json"] == (saved / "model" / "preprocessor_config.json").read_bytes()
    assert hub.commits == [(REPO, "main", "Upload a merge")]
    assert {token for _, token in hub.asked} == {"Bearer hf_writes"}
    assert not hub.repos[REPO]["private"]


def test_nothing_that_goes_up_tells_of_the_machine(merged, saved, hub):
    place = str(merged[0])
    told = {path.name for path in saved.rglob("*") if path.is_file() and place in path.read_text(errors="replace")}
    assert told == {"README.md", "recipe.yaml", "adapter_config.json"}
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    push(saved, REPO)
    files = hub.repos[REPO]["files"]
    for path, content in files.items():
        for machine in (place, str(saved), str(Path.home()) + "/"):
            assert machine.encode() not in content, path
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["model"], recipe["adapters"]) == ("base", {"one": "one", "two": "two"})
    assert recipe["record"]["files"] == sorted(files)
    assert json.loads(files["lora/adapter_config.json"])["base_model_name_or_path"] == "base"
    # The folder itself stays as it is.
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_a_user_without_a_home_can_push(saved, monkeypatch):
    expected = pushed_files(saved, REPO)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as of a container's --user that it does not know
    assert pushed_files(saved, REPO) == expected


def test_the_card_that_goes_up_loads_from_the_hub(saved, hub):
    push(saved, REPO)
    card = hub.repos[REPO]["files"]["README.md"].decode()
    assert f'pipeline("image-classification", model="{REPO}")' in card
    assert 'from_pretrained(\n    "base",' in card
    assert 'PeftModel.from_pretrained(base_model, "lora")' in card
    assert f"`hf download {REPO} --local-dir .`" in card


def test_an_adapter_alone_lies_at_the_top(merged, hub, tmp_path):
    out = merged[1].save(tmp_path / "out", ["lora"])
    push(out, REPO)
    files = hub.repos[REPO]["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"} <= set(files)
    assert f'PeftModel.from_pretrained(base_model, "{REPO}")' in files["README.md"].decode()


@pytest.mark.parametrize(
    ("code", "pushed"),
    [
        ('AutoModel.from_pretrained(\n    ".",\n    trust_remote_code=True,\n)', f'"{REPO}",'),
        ('model.base_model.load_adapter(".")', f'model.base_model.load_adapter("{REPO}")'),
        ('path, _, parameter = name.rpartition(".")', 'name.rpartition(".")'),
    ],
)
def test_only_what_is_loaded_becomes_the_repository(merged, tmp_path, code, pushed):
    out = merged[1].save(tmp_path / "out", "lora")
    (out / "README.md").write_text(f"```python\n{code}\n```\nThe text says from_pretrained(\".\").\n")
    told = pushed_files(out, REPO)["README.md"].decode()
    assert pushed in told
    assert told.endswith('The text says from_pretrained(".").\n')


def test_a_name_that_only_ends_like_a_path_stays(merged, tmp_path):
    out = merged[1].save(tmp_path / "out", "lora")
    card = (out / "README.md").read_text() + f"\norg{merged[0]}/base and {merged[0]}/base-2 and {merged[0]}/base.\n"
    (out / "README.md").write_text(card)
    told = pushed_files(out, REPO)["README.md"].decode()
    assert told.endswith(f"\norg{merged[0]}/base and {merged[0]}/base-2 and base.\n")


def test_words_that_look_like_a_path_are_none(merged, tmp_path):
    inputs = {"labels": {"one": ["/r/cats", "/r/dogs"]}, "data": {"text": "/{question}", "tokenizer": "/home/x/words"}}
    result = dataclasses.replace(merged[1], inputs=inputs)
    out = result.save(tmp_path / "out", "lora", head="one", labels={"one": ["/r/cats", "/r/dogs"]})
    told = yaml.safe_load(pushed_files(out, REPO)["recipe.yaml"])
    assert (told["labels"], told["data"]) == (inputs["labels"], {"text": "/{question}", "tokenizer": "words"})


def test_what_another_merge_left_in_a_repository_goes_with_the_next_push(merged, saved, hub, tmp_path):
    place, result = merged
    sharded = result.save(tmp_path / "sharded", ["model"], max_shard_size="10KB")
    push(sharded, REPO)
    hub.repos[REPO]["files"]["mine.safetensors"] = b"mine"
    # The same merge, with an adapter beside it: shards that no index names any more go.
    push(saved, REPO)
    assert set(hub.repos[REPO]["files"]) == {"mine.safetensors", *pushed_files(saved, REPO)}
    # An adapter at the top would be loaded with the model that is there.
    lora = result.save(tmp_path / "lora", "lora")
    before = dict(hub.repos[REPO]["files"])
    with pytest.raises(ValueError, match=f"push_to_hub: {REPO} would hold a model and an adapter in one place"):
        push(lora, REPO)
    assert hub.repos[REPO]["files"] == before
    # Of another merge, nothing is left.
    adapters = {task: place / task for task in ("one", "two")}
    other = nsc_merge.merge(served_cases.load(place / "base"), adapters, method="task_arithmetic", scale=0.1)
    other = other.save(tmp_path / "other", "lora")
    push(other, REPO)
    assert set(hub.repos[REPO]["files"]) == {"mine.safetensors", *pushed_files(other, REPO)}


@pytest.mark.parametrize("recipe", [b"[", b"record: 3", b"record: {merge: a, files: [notes.txt, ../x, {}]}"])
def test_a_repository_of_someone_else_keeps_its_files(merged, hub, tmp_path, recipe):
    hub.repos[REPO] = {"private": False, "files": {"recipe.yaml": recipe, "notes.txt": b"mine"}}
    out = merged[1].save(tmp_path / "out", "lora")
    push(out, REPO)
    assert set(hub.repos[REPO]["files"]) == {"notes.txt", *pushed_files(out, REPO)}


def test_a_licence_that_somebody_put_into_a_repository_stays(hub, tmp_path):
    """As in a folder that is saved to: only what an earlier push put there is replaced."""
    base = served_cases.write_base("llama", tmp_path / "base")
    for name in ("LICENSE", "NOTICE"):
        (base / name).write_text("the base's")
    adapters = served_cases.write_adapters(base, tmp_path, "llama")
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic", scale=0.5)
    out = result.save(tmp_path / "out", ["model", "lora"])
    own = {"LICENSE": b"mine", "lora/NOTICE": b"mine", "notes.txt": b"mine"}
    hub.repos[REPO] = {"private": False, "files": {**own}}
    for _ in range(2):
        push(out, REPO)
        files = hub.repos[REPO]["files"]
        assert {name: content for name, content in files.items() if content == b"mine"} == own
        assert files["NOTICE"] == files["lora/LICENSE"] == b"the base's"
        recorded = yaml.safe_load(files["recipe.yaml"])["record"]["files"]
        assert {"LICENSE", "lora/LICENSE", "NOTICE", "lora/NOTICE"} & set(recorded) == {"NOTICE", "lora/LICENSE"}
    # What a push of ours put there goes with the next, and what is somebody's own stays.
    (base / "NOTICE").write_text("a later one")
    again = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic", scale=0.1)
    push(again.save(tmp_path / "again", ["model"]), REPO)
    files = hub.repos[REPO]["files"]
    assert (files["LICENSE"], files["lora/NOTICE"], files["NOTICE"]) == (b"mine", b"mine", b"a later one")
    assert "lora/LICENSE" not in files


def test_private_and_a_branch(saved, hub):
    assert push(saved, REPO, private=True, revision="try") == f"{hub.url}/{REPO}/tree/try"
    assert hub.repos[REPO]["private"]
    assert hub.commits == [(REPO, "try", "Upload a merge")]
    # Again, where there is one.
    push(saved, REPO, private=True)
    assert len(hub.commits) == 2


def test_what_is_to_be_private_does_not_go_to_a_public_repository(saved, hub):
    hub.repos[REPO] = {"private": False, "files": {}}
    with pytest.raises(ValueError, match=f"expected a private repository, and {REPO} is public"):
        push(saved, REPO, private=True)
    assert hub.repos[REPO]["files"] == {}


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", r"refused someone/merged \(401\): the token is not valid"), ("hf_reads", r"\(403\): .* may not")],
)
def test_a_token_that_may_not_is_told_in_one_line(saved, hub, token, message):
    with pytest.raises(OSError, match=f"push_to_hub: .*{message}") as found:
        push(saved, REPO, token=token)
    assert "\n" not in str(found.value)
    assert hub.repos == {}


def test_without_token_or_network_or_merge_nothing_is_asked(saved, hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="push_to_hub: expected owner/name, found 'merged'"):
        push(saved, "merged")
    with pytest.raises(ValueError, match="push_to_hub: expected owner/name, found 'a b/c'"):
        push(saved, "a b/c")
    with pytest.raises(ValueError, match="push_to_hub: .* holds no merge"):
        push(tmp_path, REPO)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub: expected a token that may write, found none: set HF_TOKEN"):
        push(saved, REPO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="push_to_hub: the hub cannot be reached for someone/merged: "):
        push(saved, REPO, token="hf_writes")
    assert hub.asked == []


def test_offline_is_told(saved, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="push_to_hub: someone/merged cannot be reached with HF_HUB_OFFLINE set"):
        push(saved, REPO)
    assert hub.asked == []


def test_code_that_came_with_the_base_goes_up_with_what_needs_it(tmp_path):
    base = served_cases.write_base("llama", tmp_path / "base")
    fields = json.loads((base / "tokenizer_config.json").read_text())
    fields["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
    (base / "tokenization_own.py").write_text("mark = 1")
    adapters = served_cases.write_adapters(base, tmp_path, "llama")
    result = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic", scale=0.5)
    result.inputs["trust_remote_code"] = True
    out = result.save(tmp_path / "out", ["model"])
    # Of the same merge, what an earlier save wrote still counts.
    result.save(out, ["lora"])
    (out / "model" / "mine.py").write_text("mine")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["record"]["files"] += ["model/mine.py", "../base/tokenization_own.py"]
    recipe["record"]["code"]["model/mine.py"] = "0" * 64
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    files = pushed_files(out, REPO)
    assert files["tokenization_own.py"].read_text() == files["lora/tokenization_own.py"].read_text() == "mark = 1"
    assert {file for file in files if file.endswith(".py")} == {"tokenization_own.py", "lora/tokenization_own.py"}
    told = yaml.safe_load(files["recipe.yaml"])["record"]
    assert set(told["files"]) == set(files)
    assert set(told["code"]) == {"tokenization_own.py", "lora/tokenization_own.py"}
    # Another merge leaves none of it behind, and all that is a user's own.
    other = nsc_merge.merge(served_cases.load(base), adapters, method="task_arithmetic", scale=0.1)
    other.save(out, ["model"])
    assert {file.name for file in out.rglob("*.py")} == {"mine.py"}


def test_a_link_in_the_place_of_a_file_is_not_followed(saved, hub, tmp_path):
    (tmp_path / "victim").write_text("private")
    (saved / "heads" / "two.json").unlink()
    (saved / "heads" / "two.json").symlink_to(tmp_path / "victim")
    recipe = yaml.safe_load((saved / "recipe.yaml").read_text())
    recipe["record"]["files"] += ["notes.txt", "../victim", "model/secret.json"]
    (saved / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    push(saved, REPO)
    files = hub.repos[REPO]["files"]
    assert not {"heads/two.json", "notes.txt", "../victim", "secret.json"} & set(files)
    assert b"private" not in files.values()
