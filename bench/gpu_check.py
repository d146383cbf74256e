"""Correctness of the GPU backends on the hardware at hand.

    python bench/gpu_check.py --out correctness.jsonl [--workers 12] [--smallest]

Every case runs forward and backward against float64 on the GPU, with memory poisoned by NaN: the error may be twice
that of eager torch in the same dtype with the same rounding points. Then the same inputs again, which must give the
same bits: repeated, replayed from a CUDA graph, on several streams at once, from two graphs at once, and compiled by
torch with mode="reduce-overhead". Cases are spread over processes because the time goes into compiling. Exits with 1 if
any case fails.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters as compiler_counters

import nsc_kernels as nk
from gpu_common import Rows, arguments, captured, device, read_rows, synchronize, test_problems
from nsc_kernels import reference
from nsc_kernels.backends import cuda, registry
from nsc_kernels.triton import columns, launch

problems = test_problems()

GPU_BACKENDS = ("triton", "cuda")
UNEQUAL = (3, 0, 16, 5, 1, 31)


class Case(NamedTuple):
    T: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    dtype: str
    per_row: bool = False
    given: str = "all"  # what the gradients are of: "all", "y", "statistics"
    base: bool = True
    precision: str = "highest"


def cases(dry_run: bool) -> list[Case]:
    """The grid: both schedules, every tile, the shapes of the benchmark, and what divides nothing."""
    if dry_run:
        return [
            Case(5, 24, 40, (4, 4), "bfloat16"),
            Case(19, 40, 24, UNEQUAL, "float32", per_row=True),
        ]
    r16 = {K: (16,) * K for K in (1, 6, 8, 20, 32)}
    layers = [(768, 768, r16[20]), (4096, 4096, r16[6]), (4096, 1024, r16[6])]
    layers += [(4096, 4096, r16[32]), (4096, 4096, r16[1])]
    grid = [
        Case(T, d_in, d_out, ranks, "bfloat16")
        for (d_in, d_out, ranks), T in itertools.product(layers, (1, 63, 256, 1536, 6304, 16384))
    ]
    grid += [
        Case(T, 760, 1128, ranks, dtype, per_row=per_row)
        for T, ranks, dtype, per_row in itertools.product(
            (1, 1000, 20001), (UNEQUAL, r16[8]), ("bfloat16", "float16", "float32"), (False, True)
        )
    ]
    grid += [Case(T, 768, 1001, r16[8], "float32", precision="high") for T in (63, 2049, 20001)]
    grid += [Case(T, 768, 760, r16[32], "float32") for T in (63, 2049)]
    grid += [
        Case(T, 768, 768, ranks, "bfloat16", given=given, base=base)
        for T, ranks, given, base in itertools.product(
            (300, 9000), (r16[6], (2,) * 64), ("y", "statistics"), (False, True)
        )
    ]
    return [
        *grid,
        Case(300, 1, 1, (1,), "bfloat16"),
        Case(300, 768, 768, (0, 0), "bfloat16"),
        Case(0, 64, 64, (4,), "float32"),
    ]


class Run:
    """One case on one backend."""

    def __init__(self, backend: ModuleType | SimpleNamespace, case: Case, on: torch.device, seed: int = 0):
        self.backend, self.case = backend, case
        dtype = getattr(torch, case.dtype)
        self.p = problems.problem(case.T, case.d_in, case.d_out, case.ranks, dtype, on, per_row=case.per_row, seed=seed)

    def _inputs(self, wide: bool = False) -> dict[str, Tensor | None]:
        p, case = self.p, self.case
        found: dict[str, Tensor | None] = {
            "z": p.z,
            "A": p.A,
            "Bt": p.Bt,
            "lam": p.lam,
            "base": p.base if case.base else None,
            "dy": p.dy if case.given != "statistics" else None,
            "dquad": p.dquad if case.given != "y" else None,
            "dsqnorm": p.dsqnorm if case.given != "y" else None,
        }
        return {name: t if t is None or not wide else t.double() for name, t in found.items()}

    def _all(self, module: Any, inputs: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        i, offsets = inputs, self.p.offsets
        stats = self.case.given != "y"
        saved = (True,) if module is not reference else ()
        y, quad, sqnorm, own_u = module.forward(i["z"], i["A"], i["Bt"], offsets, i["lam"], i["base"], stats, *saved)
        dz, dlam = module.backward(
            i["dy"], i["dquad"], i["dsqnorm"], own_u if u is None else u, i["z"], i["A"], i["Bt"], offsets, i["lam"],
            None, True, True,
        )  # fmt: skip
        found = {"y": y, "u": own_u, "dz": dz, "dlam": dlam}
        return found | ({"quad": quad, "sqnorm": sqnorm} if stats else {})

    def __call__(self) -> dict[str, Tensor]:
        """Forward, and backward from the forward's own u."""
        return self._all(self.backend, self._inputs())

    def check(self) -> dict[str, tuple[float, float]]:
        """Error and bound of every result. The backward of all three starts from this backend's u."""
        ours = self()
        eager = self._all(reference, self._inputs(), ours["u"])
        exact = self._all(reference, self._inputs(wide=True), ours["u"].double())
        return {name: problems.errors(ours[name], eager[name], exact[name]) for name in ours}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bitwise, NaN included in what differs."""
    return all(torch.equal(first[name], second[name]) for name in first)


def repeats(run: Run, on: torch.device) -> bool:
    first = run()
    return all(same(first, run()) for _ in range(5))


def replays(run: Run, on: torch.device) -> bool:
    """A captured graph, its results overwritten before each of three replays."""
    expected, found = run(), {}
    graph = captured([lambda: found.update(run())], on)
    for _ in range(3):
        for t in found.values():
            t.fill_(float("nan"))
        graph()
        synchronize(on)
        if not same(expected, found):
            return False
    return True


def _overlapping(calls: list[Callable[[], dict[str, Tensor] | None]], rounds: int) -> list[list[Any]]:
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Any]] = [[] for _ in calls]
    torch.cuda.synchronize()
    for _ in range(rounds):
        for stream, call, kept in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(call())
    torch.cuda.synchronize()
    return results


def streams(run: Run, on: torch.device) -> bool:
    """Four streams at once, without a word between them."""
    expected = run()
    return all(same(expected, found) for kept in _overlapping([run] * 4, 8) for found in kept)


def two_graphs(run: Run, on: torch.device) -> bool:
    """Two graphs captured on one stream, replayed on two, with eager launches on a third."""
    expected, first, second = run(), {}, {}
    graphs = [captured([lambda into=into: into.update(run())], on) for into in (first, second)]
    for t in (*first.values(), *second.values()):
        t.fill_(float("nan"))
    _overlapping([graphs[0], graphs[1], run], 20)
    return same(expected, first) and same(expected, second)


def reduce_overhead(run: Run, on: torch.device) -> bool:
    """Compiled with torch's own CUDA graphs, whose warm-up is the first to need counters and tables of owners."""
    p = run.p
    bank = nk.AdapterBank(p.A, p.Bt, p.offsets)

    def objective(z: Tensor, lam: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return nk.merged_lora_nsc(z, bank, lam, base)

    def results(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        z, lam, base = (t.clone().requires_grad_() for t in (p.z, p.lam, p.base))
        outputs = function(z, lam, base)
        torch.autograd.backward(outputs, (p.dy, p.dquad, p.dsqnorm))
        found = dict(zip(("y", "quad", "sqnorm", "dz", "dlam"), (*outputs, z.grad, lam.grad), strict=True))
        return {name: t.detach().clone() for name, t in found.items()}  # the next call writes over a graph's outputs

    for kept in (launch.counter_pool, cuda.counter_pool, columns.owner_table):
        kept.cache_clear()
    compiler_counters.clear()
    torch._dynamo.reset()
    with nk.use_backend(run.backend.__name__.rpartition(".")[2]):
        compiled = torch.compile(objective, mode="reduce-overhead")
        found = [results(compiled) for _ in range(5)]  # warm-up, recording, replays
        expected = results(objective)
    if compiler_counters["inductor"]["cudagraph_skips"]:
        raise RuntimeError("torch did not use CUDA graphs")
    return all(same(expected, each) for each in found)


def beyond_int32(backend: ModuleType, on: torch.device) -> dict[str, tuple[float, float]]:
    """More than 2^31 elements in z and y; the last rows must be right. About 13 GB."""
    T, d = (1 << 17) + 100, 1 << 14
    p = problems.problem(1, d, d, (16,), torch.bfloat16, on)
    z = torch.randn(T, d, device=on, dtype=torch.bfloat16)
    y, quad, sqnorm, u = backend.forward(z, p.A, p.Bt, p.offsets, p.lam, z, True, True)
    dz, _ = backend.backward(y, quad, sqnorm, u, z, p.A, p.Bt, p.offsets, p.lam, None, True, False)
    tail, found = slice(T - 200, T), {}
    for name, dtype in (("eager", torch.bfloat16), ("exact", torch.float64)):
        i = [t[tail].to(dtype) for t in (z, y, u)]
        A, Bt = p.A.to(dtype), p.Bt.to(dtype)
        lam, q, n = (t.double() if dtype is torch.float64 else t for t in (p.lam, quad[tail], sqnorm[tail]))
        forward = reference.forward(i[0], A, Bt, p.offsets, lam, i[0], True)
        backward = reference.backward(i[1], q, n, i[2], i[0], A, Bt, p.offsets, lam, None, True, False)
        found[name] = dict(zip(("y", "quad", "sqnorm", "u", "dz"), (*forward, backward[0]), strict=True))
    ours = {"y": y[tail], "quad": quad[tail], "sqnorm": sqnorm[tail], "u": u[tail], "dz": dz[tail]}
    return {name: problems.errors(t, found["eager"][name], found["exact"][name]) for name, t in ours.items()}


def trials(names: list[str], dry_run: bool, smallest: bool) -> Iterator[tuple[str, str, Case | None]]:
    """(backend, what, case), in an order in which every share of them is a sample of the grid."""
    chosen = cases(dry_run)[:1] if smallest else cases(dry_run)
    for case, name in itertools.product(chosen, names):
        yield name, "accuracy", case
    if smallest:
        return
    bitwise = cases(True) if dry_run else [case for case in cases(False) if case.T in (63, 256, 6304)]
    for case, what, name in itertools.product(bitwise, ("repeats", "replays"), names):
        yield name, what, case
    if not dry_run:
        for case, what, name in itertools.product(bitwise[:8], ("streams", "two_graphs"), names):
            yield name, what, case
        for T, ranks, name in itertools.product((63, 6304), (UNEQUAL, (16,) * 6), names):
            yield name, "reduce_overhead", Case(T, 760, 1128, ranks, "bfloat16")
        for case in (case for case in bitwise if "cuda" in names and case.dtype != "float32"):
            yield "cuda", "clusters", case
        for name in names:
            yield name, "beyond_int32", None


def clusters(run: Run, on: torch.device) -> dict[str, tuple[float, float]]:
    """Every variant of the CUDA C++ kernel with every size of cluster; 16 blocks only where the device can run them."""
    backend, found = run.backend, {}
    for variant, size in itertools.product(backend.variants_of(run.p.offsets[-1]), (1, 2, 4, 8, 16)):
        how = {"variant": variant, "cluster": size}
        run.backend = SimpleNamespace(
            forward=partial(backend.forward, **how), backward=partial(backend.backward, **how)
        )
        try:
            found |= {f"{name} of variant {variant} in clusters of {size}": e for name, e in run.check().items()}
        except RuntimeError:
            if size <= 8:
                raise
        finally:
            run.backend = backend
    return found


BITWISE = {
    "repeats": repeats,
    "replays": replays,
    "streams": streams,
    "two_graphs": two_graphs,
    "reduce_overhead": reduce_overhead,
}


def attempt(name: str, what: str, case: Case | None, on: torch.device) -> dict[str, Any]:
    """One trial as a row: ``passed``, and why not."""
    backend: Any = registry.load(name)[0]
    row: dict[str, Any] = {"backend": name, "what": what, "case": None if case is None else case._asdict()}
    try:
        if what == "beyond_int32":
            if torch.cuda.mem_get_info(on)[0] < 20 << 30:
                return row | {"passed": None, "why": "less than 20 GB of memory free"}
            found = beyond_int32(backend, on)
        else:
            assert case is not None
            torch.set_float32_matmul_precision(case.precision)
            run = Run(backend, case, on)
            shape = (case.T, case.d_in, case.d_out, run.p.offsets)
            reason = backend.rejects(registry.Call(on, run.p.z.dtype, *shape))
            if reason is not None:
                return row | {"passed": None, "why": reason}
            if what in BITWISE:
                passed = BITWISE[what](run, on)
                return row | {"passed": passed, "why": None if passed else "results differ bitwise"}
            found = clusters(run, on) if what == "clusters" else run.check()
        wrong = [f"{n}: error {e:.3g}, bound {b:.3g}" for n, (e, b) in found.items() if not e <= b]
        return row | {"passed": not wrong, "why": "; ".join(wrong) or None, "errors": found}
    except Exception as error:
        return row | {"passed": False, "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def work(args: Any, names: list[str]) -> int:
    """This process's share of the trials."""
    on = device(args.dry_run)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    rows = Rows(args.out)
    share, shares = args.share
    failed = 0
    for name, what, case in list(trials(names, args.dry_run, args.smallest))[share::shares]:
        row = attempt(name, what, case, on)
        if on.type == "cuda":
            found = torch.cuda.get_device_properties(on)
            row |= {"device": found.name, "arch": f"sm_{10 * found.major + found.minor}"}
        rows.write({**row, "dry_run": args.dry_run})
        failed += row["passed"] is False
    return int(failed > 0)


def distribute(args: Any) -> int:
    """Run the shares in processes of their own, and put their rows together."""
    parts = [args.out.with_suffix(f".{i}.jsonl") for i in range(args.workers)]
    flags = [flag for flag, on in (("--dry-run", args.dry_run), ("--smallest", args.smallest)) if on]
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    running = [
        subprocess.Popen([*command, "--out", str(part), "--share", str(i), str(args.workers)])
        for i, part in enumerate(parts)
    ]
    codes = [process.wait() for process in running]
    rows = [row for part in parts for row in read_rows(part)]
    merged = Rows(args.out)
    for row in rows:
        merged.write(row)
    for part in parts:
        part.unlink(missing_ok=True)
    return int(any(codes))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--smallest", action="store_true", help="one small case, for compute-sanitizer")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [name for name in GPU_BACKENDS if registry.load(name)[0] is not None and registry.load(name)[1] is None]
    code = distribute(args) if args.workers > 1 else work(args, names)
    rows = read_rows(args.out)
    if args.share == (0, 1):
        for row in rows:
            if row["passed"] is False:
                print(f"FAILED {row['backend']} {row['what']} {row['case']}: {row['why']}")
        passed, failed = (sum(row["passed"] is value for row in rows) for value in (True, False))
        print(f"{', '.join(names) or 'no GPU backend available'}: {passed} of {len(rows)} passed, {failed} failed")
    return code or int(not rows)


if __name__ == "__main__":
    sys.exit(main())
