"""A dry run refuses what the run refuses, of methods that take no steps, too."""

from __future__ import annotations

import pytest
from cli_cases import contents, make_place
from zoo import build, write_adapter

from nsc_merge.commands.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Adapters of unequal ranks, one of which trained an embedding."""
    folder, base = make_place(build("llama-cls"), tmp_path_factory.mktemp("place")), build("llama-cls")
    targets = ["q_proj", "v_proj", "embed_tokens"]
    write_adapter(base, folder / "adapters" / "topic", 2, r=2, target_modules=targets, task_type="SEQ_CLS")
    return folder


@pytest.mark.parametrize(
    ("method", "options", "others", "message"),
    [
        ("linear", "{}", (), "adapters: method 'linear' adds factors and needs equal ranks in a module"),
        ("ties", "{trim_scope: factors}", (), "adapters: trim_scope='factors' adds factors and needs equal ranks"),
        ("ties", "{weights: {nli: 1}}", (), "options.weights: expected one value for each of ['nli', 'topic']"),
        ("task_arithmetic", "{scale: {nli: 1}}", (), "options.scale: expected one value for each of ['nli', 'topic']"),
        ("regmean", "{}", (), "method 'regmean': model.embed_tokens is no linear"),
        ("fisher", "{}", (), "method 'fisher': model.embed_tokens is no linear"),
        ("fisher", "{likelihood: {nli: gaussian}}", (), "options.likelihood: expected one for each of"),
        # A head that is fetched as the model runs.
        ("fisher", "{}", ("adapters.topic=adapters/nli", "device_map={'': disk}"), "outputs: the adapter of 'nli'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_does(place, monkeypatch, capsys, method, options, others, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    before = contents(place)
    asked = ["options=", f"method={method}", f"options={options}", "output.formats=[model]", *others]
    found = []
    for flags in (["--dry-run"], []):
        assert main(["run", "recipe.yaml", *asked, *flags]) != 0
        found.append(capsys.readouterr().err.splitlines()[-1])
    assert found[0] == found[1]
    assert message in found[0]
    assert contents(place) == before
