"""The script that completes commands in a shell, in that shell."""

from __future__ import annotations

import builtins
import shutil
import subprocess

import pytest

from nsc_merge.commands.main import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "nsc-merge.bash"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["completion", "bash"]) == 0
    return file


def completed(script, *words, folder="."):
    code = f"""
        source {script}
        COMP_WORDS=({" ".join(map(repr, words))}) COMP_CWORD={len(words) - 1}
        _shtab_nsc_merge
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_choices_and_files(script, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    assert completed(script, "nsc-merge", "in") == {"init", "inspect"}
    assert completed(script, "nsc-merge", "run", "--dry") == {"--dry-run"}
    assert completed(script, "nsc-merge", "completion", "z") == {"zsh"}
    assert completed(script, "nsc-merge", "run", "rec", folder=tmp_path) == {"recipe.yaml"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts(capsys, shell):
    assert main(["completion", shell]) == 0
    assert "nsc-merge" in capsys.readouterr().out


def test_what_makes_it_is_named_where_it_is_missing(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name == "shtab":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["completion", "bash"]) == 1
    assert "completion: the script is made by shtab; pip install shtab" in capsys.readouterr().err
