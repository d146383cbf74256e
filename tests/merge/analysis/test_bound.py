"""Proposition 1: what it says, and where it holds."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from analysis_cases import projected, seen
from safetensors.torch import save_file
from zoo import write_adapter

import nsc_merge
from nsc_merge.adapters import Factor, load_adapter
from nsc_merge.analysis import bound as bound_module
from nsc_merge.analysis import check_bound, per_sample_ratios
from nsc_merge.analysis.bound import summary
from nsc_merge.analysis.rank_correlation import rank_correlation
from nsc_merge.commands.main import main


def test_the_bound_holds_and_is_what_the_proposition_says(llama):
    model, adapters, batches = llama
    result = nsc_merge.merge(model, adapters, method="task_arithmetic", scale=0.5)
    checks = check_bound(model, result, batches)
    assert len(checks) == 9
    merged = result.apply(copy.deepcopy(model))
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    for check in checks:
        factor = load_adapter(adapters[check["task"]], check["task"]).factors[check["path"]]
        A, B = factor.A.double(), factor.scaling * factor.B.double()
        constant = torch.linalg.svdvals(A)[-1] * torch.linalg.svdvals(B)[-1]
        assert check["constant"] == pytest.approx(constant.item())
        z = torch.cat(seen(merged, check["path"], batches))[mask].double()
        effect = (z @ A.t() @ B.t()).norm(dim=-1)
        ratio = projected(factor, z)
        bound = constant * (1 - ratio.square()).sqrt() * z.norm(dim=-1)
        assert (effect >= bound).all()
        assert check["inputs"] == int(mask.sum())
        assert check["violations"] == 0
        # The inputs differ by the rounding of the merged weights.
        assert check["tightness"] == pytest.approx((effect / bound).median().item(), rel=1e-4)
        assert check["least"] == pytest.approx((effect / bound).min().item(), rel=1e-4)
    whole = summary(checks)
    assert (whole["held"], whole["modules"], whole["trivial"]) == (True, 9, 0)


def test_a_violation_would_be_seen(llama, monkeypatch):
    """With a constant too large by far, the very same check fails."""
    from nsc_merge.analysis import bound

    original = bound._Check.__init__

    def inflated(self, *arguments):
        original(self, *arguments)
        self.constant *= 1e6

    monkeypatch.setattr(bound._Check, "__init__", inflated)
    model, adapters, batches = llama
    whole = summary(check_bound(model, adapters, batches))
    assert whole["violations"] == whole["inputs"]
    assert not whole["held"]


def test_the_bound_of_many_inputs_is_judged_by_some_of_all(monkeypatch):
    """Not by those that come first: here these are easy, and the tightest and the trend come late."""
    generator = torch.Generator().manual_seed(0)
    factor = Factor(*(torch.randn(shape, generator=generator) for shape in ((4, 16), (12, 4))), 1.5)
    inputs = torch.randn(5000, 16, generator=generator)
    inputs[:1000] = torch.linalg.qr(factor.A.t()).Q[:, 0] + 0.05 * inputs[:1000]
    A, B = factor.A.double(), 1.5 * factor.B.double()
    constant = (torch.linalg.svdvals(A)[-1] * torch.linalg.svdvals(B)[-1]).item()
    z = inputs.double()
    effect = (z @ A.t() @ B.t()).norm(dim=1)
    inside = (z @ torch.linalg.pinv(A) @ A).norm(dim=1)
    ratio = (1 - (inside / z.norm(dim=1)).square()).clamp(min=0).sqrt()
    expected = rank_correlation(ratio.tolist(), (effect / z.norm(dim=1)).tolist())
    times = effect / (constant * inside)
    for most, size, error in ((10**6, 5000, 1e-6), (400, 170, 0.1), (400, 5000, 0.1)):
        monkeypatch.setattr(bound_module, "_KEPT", most)
        check = bound_module._Check("t", "q", factor)
        for part in inputs.split(size):
            check.add(part)
        found = check.document()
        assert found["inputs"] == 5000
        assert found["least"] == pytest.approx(times.min().item(), rel=1e-9)
        assert found["tightness"] == pytest.approx(times.median().item(), rel=error)
        assert found["rho"] == pytest.approx(expected, abs=error)


def test_deficient_factors_make_the_bound_trivial_or_exact(llama):
    model, adapters, batches = llama
    a = load_adapter(adapters["a"], "a")
    path = next(iter(a.factors))
    factor = a.factors[path]
    zero = nsc_merge.Factor(factor.A, torch.zeros_like(factor.B), 1.0)
    # A of rank 3 in four rows: its least singular value that is not 0 counts.
    repeated = nsc_merge.Factor(torch.cat([factor.A[:3], factor.A[:1]]), factor.B, 1.0)
    isometric = nsc_merge.Factor(
        torch.linalg.qr(factor.A.t()).Q.t().contiguous(), torch.linalg.qr(factor.B).Q.contiguous(), 2.0
    )
    found = {
        name: check_bound(model, {"a": nsc_merge.Adapter("a", {path: one})}, batches)[0]
        for name, one in (("zero", zero), ("repeated", repeated), ("isometric", isometric))
    }
    assert (found["zero"]["constant"], found["zero"]["tightness"], found["zero"]["violations"]) == (
        0.0,
        None,
        0,
    )
    sigma = torch.linalg.svdvals(repeated.A.double())
    assert sigma[-1] < 1e-6
    least = sigma[-2] * torch.linalg.svdvals(factor.B.double())[-1]
    assert found["repeated"]["constant"] == pytest.approx(least.item(), rel=1e-5)
    assert found["repeated"]["violations"] == 0
    # With orthonormal factors the bound is the effect.
    assert found["isometric"]["constant"] == pytest.approx(2.0, rel=1e-5)
    assert found["isometric"]["tightness"] == pytest.approx(1.0, rel=1e-5)
    # Their rounding to float32 may swap inputs whose effects agree to seven digits.
    assert found["isometric"]["rho"] < -0.999
    whole = summary(list(found.values()))
    assert whole["trivial"] == 1
    assert summary([*found.values(), found["zero"]])["trivial"] == 2
    # Where nothing has an effect there is no order, which is not that of the others.
    assert math.isnan(found["zero"]["rho"])
    assert whole["rho"] == pytest.approx((found["repeated"]["rho"] + found["isometric"]["rho"]) / 2)
    assert whole["tightness"] == pytest.approx((found["repeated"]["tightness"] + 1) / 2, rel=1e-5)
    assert (summary([found["zero"]])["rho"], summary([found["zero"]])["tightness"]) == (None, None)
    # More columns than rows: B maps some direction to zero, whatever its singular values are.
    A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 16), (4, 6)))
    assert bound_module._Check("t", "q", Factor(A, B, 1.0)).constant == 0.0
    # And so does one with a column twice, which has no least singular value but by rounding.
    assert bound_module._Check("t", "q", Factor(A[:2], B[:, :1].repeat(1, 2), 1.0)).constant == 0.0


def test_inputs_of_zeros_do_not_count():
    generator = torch.Generator().manual_seed(0)
    A, B, inputs = (torch.randn(shape, generator=generator) for shape in ((2, 8), (6, 2), (9, 8)))
    checks = [bound_module._Check("t", "q", Factor(A, B, 1.0)) for _ in range(2)]
    for check, given in zip(checks, (inputs, torch.cat([torch.zeros(3, 8), inputs])), strict=True):
        check.add(given)
    assert checks[0].document() == checks[1].document()
    assert checks[0].inputs == 9


@pytest.mark.parametrize("measure", [check_bound, per_sample_ratios])
def test_a_model_in_training_is_measured_as_it_is_used_and_left_as_it_was(llama, measure):
    model, adapters, batches = llama
    modes, model = [], copy.deepcopy(model).train()
    watch = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    found = measure(model, adapters, batches, blocks=1)
    watch.remove()
    assert set(modes) == {False}
    assert model.training
    assert not any(module._forward_pre_hooks or hasattr(module, "measure") for module in model.modules())
    paths = found.paths if measure is per_sample_ratios else [check["path"] for check in found]
    assert {path.split(".")[2] for path in paths} == {"2"}


def test_what_no_input_reaches_is_named(llama):
    model, adapters, _ = llama
    with pytest.raises(RuntimeError, match=r"inputs: the forward reaches no model\.layers\."):
        check_bound(model, adapters, [])


def test_the_bound_on_the_command_line(llama, tmp_path, capsys):
    model, adapters, batches = llama
    model.save_pretrained(tmp_path / "base")
    save_file({**batches[0], "labels": torch.zeros(3)}, tmp_path / "inputs.safetensors")
    arguments = ["--model", str(tmp_path / "base"), "--inputs", str(tmp_path / "inputs.safetensors")]
    assert main(["analyse", "bound", str(adapters["a"]), *arguments, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    inputs = 6 * int(batches[0]["attention_mask"].sum())
    assert f"held at all {inputs} inputs of 6 modules" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bound.json", "bound.png"}
    assert main(["analyse", "bound", str(adapters["a"]), *arguments, "--at", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["held"] is True
    write_adapter(model, tmp_path / "dora", 3, r=2, target_modules=["v_proj"], use_dora=True)
    assert main(["analyse", "bound", str(tmp_path / "dora"), *arguments]) == 1
    assert "dora='convert'" in capsys.readouterr().err
    assert main(["analyse", "bound", str(tmp_path / "dora"), *arguments, "--dora", "convert"]) == 0
    with pytest.raises(SystemExit):
        main(["analyse", "bound", str(adapters["a"]), *arguments, "--blocks", "first"])
    assert "expected last_quarter, a number" in capsys.readouterr().err
