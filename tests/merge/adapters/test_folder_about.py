"""What lies beside an adapter's weights and says what it is; whatever it holds, the adapter is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nsc_merge
from nsc_merge.adapters.folder_about import class_names, labels_beside, license_beside


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\nbase_model: x\n---\n# Title\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "other (llama3)"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", "mit, cc0-1.0"),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("# Title\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: mit\nlicense: gpl\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_of_a_card(card, found, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_beside(tmp_path) == found


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, {0: "cat", 1: "dog"}),
        ({"id2label": {"1": "dog", "0": "cat"}}, {0: "cat", 1: "dog"}),
        ({"id2label": {"1": "cat", "2": "dog"}}, {}),
        ({"id2label": {"0": 1}}, {}),
        ({"id2label": ["cat"]}, {}),
        ({}, {}),
        ([], {}),
    ],
)
def test_the_labels_of_a_configuration(config, found, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert labels_beside(tmp_path) == found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_anything_may_lie_there(tmp_path_factory, content):
    place = tmp_path_factory.mktemp("about")
    for name, before in (("README.md", b"---\n"), ("config.json", b"")):
        (place / name).write_bytes(before + content)
    assert isinstance(license_beside(place), str | None)
    assert isinstance(labels_beside(place), dict)


def test_folders_and_pipes_of_these_names_say_nothing(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert (license_beside(tmp_path), labels_beside(tmp_path)) == (None, {})


def test_an_adapter_is_read_with_what_its_folder_says(folders):
    (folders["plain"] / "README.md").write_text("---\nlicense: mit\n---\n")
    (folders["plain"] / "config.json").write_text('{"id2label": {"0": "a"}}')
    adapter = nsc_merge.load_adapter(folders["plain"], "plain")
    assert (adapter.about.license, adapter.about.id2label) == ("mit", {0: "a"})
    # They are no part of what was merged.
    assert set(adapter.sha256) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("numbered", "names"),
    [
        ({0: "cat", 1: "dog"}, ["cat", "dog"]),
        ({1: "dog", 0: "cat"}, ["cat", "dog"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, []),
        ({0: "LABEL_1", 1: "LABEL_0"}, ["LABEL_1", "LABEL_0"]),
        ({0: "cat", 2: "dog"}, []),
        ({}, []),
    ],
)
def test_names_of_classes_are_those_that_say_something(numbered, names):
    assert class_names(numbered) == names
