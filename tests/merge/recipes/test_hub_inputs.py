"""Base and adapters from the hub: fetched as huggingface_hub does, told by their commits, and nothing asked but for an
id that was given.
"""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from cli_cases import make_place
from hub_cases import Hub, serving
from safetensors.torch import save_file
from zoo import build

import nsc_merge
from nsc_merge.adapters.formats.diffusers_file import FILE as DIFFUSERS_FILE
from nsc_merge.adapters.hub import READ
from nsc_merge.commands.main import main
from nsc_merge.models.bases.loading import commit_of, load_model
from nsc_merge.recipes.saved_result import load_result

SHORT = ["output.formats=coefficients", "options.steps=1", "device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder to merge in, and a hub that has the same base and adapters."""
    place = make_place(build("llama-cls"), tmp_path_factory.mktemp("place"))
    hub = Hub()
    hub.place = place
    hub.commits = {
        "base": hub.upload("me/base", place / "base"),
        "nli": hub.upload("me/nli", place / "adapters" / "nli"),
        "topic": hub.upload("me/many", place / "adapters" / "topic", within="runs/topic/"),
    }
    other = tmp_path_factory.mktemp("other")
    (other / "optimizer.pt").write_bytes(b"pickled")
    (other / "extra.bin").write_bytes(b"pickled")
    hub.upload("me/nli", other)
    with serving(hub, tmp_path_factory.mktemp("cache")):
        yield place, hub


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """Copied, so that no test sees what another wrote; nowhere near a folder called me."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0], tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def hub(made):
    made[1].requests.clear()
    return made[1]


def asked(hub):
    """Repositories and files that were asked for; of the library's own questions about programs, nothing."""
    of_repos = [path.split(" ")[1] for path in hub.requests if "/me/" in path]
    files = {path.partition("/resolve/")[2].partition("/")[2] for path in of_repos if "/resolve/" in path}
    return {"me/" + path.partition("/me/")[2].split("/")[0] for path in of_repos}, files


def record(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def coefficients(folder):
    return json.loads((folder / "coefficients.json").read_text())["coefficients"]


def test_an_adapter_is_fetched_without_what_is_not_read(place, hub):
    found = nsc_merge.load_adapter("me/nli", "nli")
    folder = nsc_merge.load_adapter(place / "adapters" / "nli", "nli")
    assert found.about.hub == f"me/nli@{hub.branches['me/nli']['main']}"
    assert found.sha256 == folder.sha256
    assert found.factors.keys() == folder.factors.keys()
    for path, factor in found.factors.items():
        assert torch.equal(factor.A, folder.factors[path].A)
    assert found.notes == (
        "extra.bin lies beside the adapter and is not read: if weights were trained there, they are missing",
    )
    repos, files = asked(hub)
    assert repos == {"me/nli"}
    assert files <= set(READ)
    assert not (found.source / "optimizer.pt").exists()


def test_revision_and_subfolder(hub):
    first = nsc_merge.load_adapter(f"me/nli@{hub.commits['nli']}", "nli")
    assert first.about.hub == f"me/nli@{hub.commits['nli']}"
    # Before other files were put beside it.
    assert first.notes == ()
    found = nsc_merge.load_adapter({"adapter": "me/many", "subfolder": "runs/topic"}, "topic")
    assert found.about.hub == f"me/many@{hub.commits['topic']}"
    assert found.sha256 == nsc_merge.load_adapter(hub.place / "adapters" / "topic", "topic").sha256
    for wrong in ({"adapter": "me/many", "folder": "runs"}, {"adapter": str(hub.place), "revision": "v1"}):
        with pytest.raises(ValueError, match=r"adapters\['topic'\]: "):
            nsc_merge.load_adapter(wrong, "topic")
    with pytest.raises(FileNotFoundError, match=r"me/many@\w+ on the hub holds no adapter_config.json .*: runs/topic"):
        nsc_merge.load_adapter("me/many", "topic")


def test_dora_is_refused_from_the_hub_as_from_a_folder(hub, tmp_path):
    shutil.copytree(hub.place / "adapters" / "nli", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    hub.upload("me/dora", tmp_path)
    for source in ("me/dora", tmp_path):
        with pytest.raises(ValueError, match="use_dora=True is refused: DoRA rescales each row"):
            nsc_merge.load_adapter(source, "nli", dora="refuse")


def test_pickled_weights_that_nobody_may_leave_out_are_refused_by_name(hub, tmp_path, place):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "adapters" / "nli" / file, tmp_path)
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"pickled")
    shutil.rmtree(place)
    hub.upload("me/pickled", tmp_path)
    with pytest.raises(ValueError, match=r"non_lora_trainables\.bin holds weights trained beside LoRA, and is pickled"):
        nsc_merge.load_adapter("me/pickled", "nli")
    assert "non_lora_trainables.bin" not in asked(hub)[1]


def test_weights_in_other_files_are_refused_with_what_to_do(hub, tmp_path, place):
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(place / "adapters" / "nli" / "adapter_config.json", old)
    (old / "adapter_model.bin").write_bytes(b"pickled")
    hub.upload("me/old", old)
    cure = r"hf download me/old --local-dir DIR fetches it, and merging DIR names the line that converts it"
    with pytest.raises(FileNotFoundError, match=rf"me/old@\w+ on the hub holds no adapter_model.safetensors .*{cure}"):
        nsc_merge.load_adapter("me/old", "nli")
    with pytest.raises(FileNotFoundError, match="to convert: python -c"):
        nsc_merge.load_adapter(old, "nli")


@pytest.mark.parametrize(
    ("file", "cure"),
    [("adapters.safetensors", "is of MLX.* hf download me/a1 --local-dir DIR$"), ("a.safetensors", "is of kohya")],
)
def test_files_of_other_trainers_are_named(hub, tmp_path, file, cure):
    save_file({"weight": torch.ones(2)}, tmp_path / file)
    repo = "me/a1" if file == "adapters.safetensors" else "me/a2"
    hub.upload(repo, tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{repo}@\w+ on the hub holds no adapter_config.json .*{cure}"):
        nsc_merge.load_adapter(repo, "nli")


def test_the_file_of_diffusers_is_fetched(hub, tmp_path):
    shapes = {"A": (2, 3), "B": (4, 2)}
    factors = {f"unet.down.to_q.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    (tmp_path / "own").mkdir()
    save_file(factors, tmp_path / "own" / DIFFUSERS_FILE)
    hub.upload("me/images", tmp_path / "own")
    found = nsc_merge.load_adapter("me/images", "images")
    assert found.about.hub.startswith("me/images@")
    assert {path: one.delta().shape for path, one in found.factors.items()} == {"down.to_q": (4, 3)}
    assert asked(hub)[1] == {DIFFUSERS_FILE}


def test_offline_the_cache_is_enough_and_nothing_is_asked(hub, monkeypatch):
    online = nsc_merge.load_adapter("me/nli", "nli")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert nsc_merge.load_adapter("me/nli", "nli").about.hub == online.about.hub
    assert nsc_merge.load_adapter(online.about.hub, "nli").sha256 == online.sha256
    for load in (lambda: nsc_merge.load_adapter("me/new", "x"), lambda: load_model("me/new", local=False)):
        with pytest.raises(OSError, match=r"me/new is not in the cache \(.*\), and HF_HUB_OFFLINE forbids"):
            load()
    assert hub.requests == []


def test_a_commit_is_looked_for_in_the_cache_where_the_library_does_not(hub, monkeypatch):
    """huggingface_hub 1.33, the last for Python 3.10, asks the hub for the files of a commit and gives up."""
    online = nsc_merge.load_adapter("me/nli", "nli")
    fetch = huggingface_hub.snapshot_download

    def older(*names, local_files_only=False, **settings):
        if not local_files_only:
            raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach the hub")
        return fetch(*names, local_files_only=True, **settings)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", older)
    assert nsc_merge.load_adapter(online.about.hub, "nli").sha256 == online.sha256
    with pytest.raises(OSError, match=r"me/new is not in the cache \(.*\), and HF_HUB_OFFLINE forbids"):
        nsc_merge.load_adapter("me/new", "x")


def test_a_folder_is_no_id(hub, place, tmp_path):
    (tmp_path / "me").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        nsc_merge.load_adapter("me/nli", "nli")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        nsc_merge.load_adapter(place / "me" / "nli", "nli")
    assert main(["run", str(place / "recipe.yaml"), *SHORT]) == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        # Of these weights tell, which are fetched for that.
        ("config.json", lambda text: text.replace('layers": 3', 'layers": 1000000000'), "hostile says 10+ layers, wh"),
        ("config.json", lambda text: "[1]", r"config\.json: expected a JSON object, found \[1\]"),
        ("config.json", lambda text: text.replace("{", '{"use_cache": true, ', 1), "key 'use_cache' is given twice"),
        ("model.safetensors", lambda text: "short", "hostile.*header"),
    ],
)
def test_a_base_of_the_hub_is_checked_like_one_in_a_folder(hub, tmp_path, place, file, change, message):
    shutil.copytree(place / "base", tmp_path / "hostile")
    changed = tmp_path / "hostile" / file
    changed.write_text(change(changed.read_text() if file == "config.json" else ""))
    hub.upload("me/hostile", tmp_path / "hostile")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^model: .*{message}") as error:
            load_model("me/hostile", local=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapters.nli=me/none"], "adapters['nli']: there is no me/none at http"),
        (["adapters.nli=me/nli@v9"], "adapters['nli']: me/nli has no revision 'v9' at http"),
        (["adapters.nli=me/gated"], "adapters['nli']: me/gated is gated: ask for access at http"),
        (["adapters.topic={adapter: me/many, subfolder: runs}"], "adapters['topic']: me/many@"),
        (["model=me/none"], "model: there is no me/none at http"),
        (["model=me/base", "revision=v9"], "model: me/base has no revision 'v9' at http"),
        (["model=me/gated"], "model: me/gated is gated: ask for access at http"),
        (["model=me/nli"], "model: me/nli on the hub holds an adapter (adapter_config.json); expected a base alone"),
        (["model=me/many"], "model: me/many holds no config.json: expected another repository"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_a_line(hub, place, capsys, overrides, message):
    hub.upload("me/gated", place / "base")
    hub.gated.add("me/gated")
    assert main(["run", str(place / "recipe.yaml"), *SHORT, *overrides]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"nsc-merge: error: {message}")
    assert not (place / "merged").exists()


def test_only_what_has_an_id_is_asked_for(hub, place):
    assert main(["run", str(place / "recipe.yaml"), *SHORT, "adapters.nli=me/nli"]) == 0
    assert asked(hub)[0] == {"me/nli"}


def test_a_merge_of_the_hub_is_told_by_commits_and_read_back_at_them(hub, place, capsys):
    from_hub = ["model=me/base", "adapters.nli=me/nli", "adapters.topic={adapter: me/many, subfolder: runs/topic}"]
    assert main(["run", str(place / "recipe.yaml"), *SHORT]) == 0
    plain = coefficients(place / "merged")
    out = place / "from-hub"
    assert main(["run", str(place / "recipe.yaml"), *SHORT, *from_hub, f"output.dir={out}"]) == 0
    assert coefficients(out) == plain
    written = record(out)
    commit, nli = hub.commits["base"], hub.branches["me/nli"]["main"]
    assert (written["model"], written["revision"]) == ("me/base", commit)
    assert written["adapters"] == {
        "nli": {"adapter": "me/nli", "revision": nli},
        "topic": {"adapter": "me/many", "revision": hub.commits["topic"], "subfolder": "runs/topic"},
    }
    assert written["record"]["hub"] == {
        "model": f"me/base@{commit}",
        "adapters": {"nli": f"me/nli@{nli}", "topic": f"me/many@{hub.commits['topic']}"},
    }
    # Others are the newest from now on.
    for repo in ("me/base", "me/nli"):
        (place / "note").mkdir(exist_ok=True)
        (place / "note" / "adapter_model.safetensors").write_bytes(b"damaged")
        (place / "note" / "config.json").write_text("{}")
        hub.upload(repo, place / "note")
    result = load_result(out)
    assert commit_of(result.model) == commit
    assert result.adapters["nli"].about.hub == f"me/nli@{nli}"
    assert main(["export", str(out), "--format", "lora", "--out", str(place / "lora")]) == 0
    assert record(place / "lora")["record"]["hub"] == written["record"]["hub"]
    assert main(["run", str(out / "recipe.yaml"), f"output.dir={place / 'again'}"]) == 0
    assert coefficients(place / "again") == plain
    capsys.readouterr()
    for repo, kept in (("me/base", commit), ("me/nli", nli)):
        hub.branches[repo]["main"] = kept


def test_inspect_takes_ids(hub, place, capsys):
    assert main(["inspect", "me/nli", str(place / "adapters" / "topic"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"]["nli"]["modules"] == {"q_proj": 3, "v_proj": 3}
    assert asked(hub)[0] == {"me/nli"}
