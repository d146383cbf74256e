"""Trained parts that several files of tests measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from quality_cases import VIT, part_of

from bench.quality import measuring
from bench.quality.suites import corpus, vit


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Of the ViT suite."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def trained(work):
    """The ViT suite."""
    lines: list[str] = []
    suite = vit.load(work, 0, log=lines.append, progress=False, settings=VIT, permuted=("sal",))
    assert len(lines) == len(vit.TASKS) + 1
    return suite


@pytest.fixture(scope="session")
def bench(trained):
    return measuring.Bench(trained, progress=False)


@pytest.fixture(scope="session")
def language_work(tmp_path_factory):
    """Of the language suites."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_root", part_of)
        yield tmp_path_factory.mktemp("language")


@pytest.fixture(scope="session")
def texts(language_work):
    return corpus.load_corpus(language_work / "llama", lambda line: None)
