"""One step of a merge as this package and as others do it, and the floor: what is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsc_merge.adapters import Factor
from nsc_merge.methods.gradient.nsc import objective_of
from nsc_merge.methods.gradient.nsc_options import resolve_options

from .problem import LAM, Problem, defaults

Step = Callable[[], object]


def loop(problem: Problem, stack: ExitStack, **options: Any) -> Step:
    chosen = resolve_options(problem.family, problem.names, options)
    objective = stack.enter_context(
        objective_of(problem.model, problem.adapters, problem.family, problem.scored, chosen)
    )
    lam = objective.coefficients.flat
    # capturable: in a CUDA graph.
    optimiser = torch.optim.AdamW([lam], lr=chosen.lr, fused=True, capturable=lam.is_cuda)

    def step() -> Tensor:
        optimiser.zero_grad()
        omega = objective.accumulate(problem.batches)
        optimiser.step()
        return omega.mean()

    return step


class Hooks:
    """The ratio as forward hooks see it: inputs of the measured linears, scored with inverted Gram matrices."""

    def __init__(self, problem: Problem, modules: dict[str, nn.Module], stack: ExitStack) -> None:
        self.tasks: list[int] = []
        self.values: list[Tensor] = []
        for path in problem.scored:
            down = [factor.A for factor in problem.factors(path)]
            inverse = [torch.linalg.inv(A.double() @ A.double().t()).float() for A in down]
            handle = modules[path].register_forward_hook(
                lambda module, args, output, down=down, inverse=inverse: self.measure(args[0], down, inverse)
            )
            stack.callback(handle.remove)

    def measure(self, z: Tensor, down: list[Tensor], inverse: list[Tensor]) -> None:
        for task in self.tasks:
            u = (z @ down[task].t()).float()
            quad = ((u @ inverse[task]) * u).sum(-1)
            share = 1 - quad / (z.float().square().sum(-1) + 1e-8)
            self.values.append(share.clamp(min=1e-12).sqrt().mean())

    def score(
        self, tasks: list[int], forward: Callable[[dict[str, Tensor]], object], batch: dict[str, Tensor]
    ) -> Tensor:
        """The sum over ``tasks`` of Eq. 4, in one forward."""
        self.tasks, self.values = tasks, []
        forward(batch)
        return torch.stack(self.values).mean() * len(tasks)


def hooked_step(
    problem: Problem, hooks: Hooks, forward: Callable[[dict[str, Tensor]], object], lams: list[nn.Parameter]
) -> Step:
    optimiser = torch.optim.AdamW(lams, lr=3e-4, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad()
        total = torch.zeros((), dtype=problem.dtype, device=problem.on)
        for batch, tasks in problem.passes:
            omega = hooks.score(tasks, forward, batch) / len(problem.names)
            omega.backward()
            total += omega.detach()
        optimiser.step()
        return total

    return step


@contextmanager
def replaced(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    originals = {path: model.get_submodule(path) for path in modules}

    def put(found: dict[str, nn.Module]) -> None:
        for path, module in found.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)

    put(modules)
    try:
        yield
    finally:
        put(originals)


def coefficients(problem: Problem) -> dict[str, nn.Parameter]:
    start = torch.full((len(problem.names),), LAM, dtype=torch.float32, device="cpu")
    return {path: nn.Parameter(start.clone()) for path in problem.paths}


class ConcatenatedLinear(nn.Module):
    """A linear with all adapters concatenated along the rank: two eager products."""

    def __init__(self, linear: nn.Linear, factors: list[Factor], lam: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.lam, self.rank = linear, lam, factors[0].rank
        self.down = torch.cat([factor.A for factor in factors])
        self.up = torch.cat([factor.scaling * factor.B for factor in factors], 1)

    def forward(self, z: Tensor) -> Tensor:
        weighted = (z @ self.down.t()) * self.lam.repeat_interleave(self.rank).to(z.dtype)
        return self.linear(z) + weighted @ self.up.t()


def concatenated(problem: Problem, stack: ExitStack) -> Step:
    lams = coefficients(problem)
    modules: dict[str, nn.Module] = {
        path: ConcatenatedLinear(problem.model.get_submodule(path), problem.factors(path), lam)
        for path, lam in lams.items()
    }
    hooks = Hooks(problem, modules, stack)

    def forward(batch: dict[str, Tensor]) -> None:
        with replaced(problem.model, modules):
            problem.model(**batch)

    return hooked_step(problem, hooks, forward, list(lams.values()))


def peft(problem: Problem, stack: ExitStack) -> Step:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=problem.shape.rank, lora_alpha=2 * problem.shape.rank)
    lams = coefficients(problem)
    modules: dict[str, Any] = {}  # PEFT's layers keep what is not a tensor beside their tensors
    for path in problem.paths:
        first, *others = problem.names
        linear = problem.model.get_submodule(path)
        layer: Any = Linear(linear, first, config=config, r=config.r, lora_alpha=config.lora_alpha)
        for name in others:
            layer.update_layer(name, config.r, lora_alpha=config.lora_alpha, config=config)
        layer.set_adapter(problem.names)
        layer.requires_grad_(False)
        for name, factor in zip(problem.names, problem.factors(path), strict=True):
            layer.lora_A[name].weight.copy_(factor.A)
            layer.lora_B[name].weight.copy_(factor.B)
        modules[path] = layer.eval()
    hooks = Hooks(problem, modules, stack)

    def forward(batch: dict[str, Tensor]) -> None:
        for path, module in modules.items():
            module.scaling = {name: 2.0 * lams[path][k] for k, name in enumerate(problem.names)}
        with replaced(problem.model, modules):
            problem.model(**batch)

    return hooked_step(problem, hooks, forward, list(lams.values()))


def dense(problem: Problem, stack: ExitStack) -> Step:
    lams = list(coefficients(problem).values())
    updates = [[factor.delta().to(factor.A.dtype) for factor in problem.factors(path)] for path in problem.paths]
    weights = [problem.model.get_submodule(path).weight for path in problem.paths]
    hooks = Hooks(problem, {path: problem.model.get_submodule(path) for path in problem.scored}, stack)
    optimiser = torch.optim.AdamW(lams, lr=3e-4, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad()
        merged = {}
        for path, weight, lam, update in zip(problem.paths, weights, lams, updates, strict=True):
            for coefficient, delta in zip(lam, update, strict=True):
                weight = weight + coefficient * delta
            merged[f"{path}.weight"] = weight
        total = torch.zeros((), dtype=problem.dtype, device=problem.on)
        for batch, tasks in problem.passes:
            omega = hooks.score(tasks, lambda kept: functional_call(problem.model, merged, (), kept), batch)
            omega = omega / len(problem.names)
            omega.backward(retain_graph=True)
            total += omega.detach()
        optimiser.step()
        return total

    return step


class _Cut(Exception):
    """Ends a forward."""


@torch.no_grad()
def embedded(problem: Problem, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the language model of a LLaVA is given for a batch."""
    found: dict[str, Tensor] = {}

    def cut(module: nn.Module, args: tuple[()], given: dict[str, Any]) -> None:
        found.update(inputs_embeds=given["inputs_embeds"], attention_mask=batch["attention_mask"])
        raise _Cut

    handle = problem.model.model.language_model.register_forward_pre_hook(cut, with_kwargs=True)
    with suppress(_Cut):
        problem.model(**batch)
    handle.remove()
    return found


def floor(problem: Problem, stack: ExitStack, together: bool = False, compiled: bool = False) -> Step:
    """Frozen weights only. What needs a gradient is what needs one in the loop: all that follows q and v of block 0.

    A vision tower is left out: it need not run at all once its output is known.
    """
    if compiled:
        for layer in list(problem.model.get_decoder().layers)[: -len(problem.scored)]:
            layer.compile()
            stack.callback(setattr, layer, "_compiled_call_impl", None)  # the model may be another contender's next
    gradient = torch.randn(problem.shape.d, device="cpu")
    modules = dict(problem.model.named_modules())
    found: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Cut

    def run(batch: dict[str, Tensor]) -> Tensor:
        handles = [modules[path].register_forward_hook(leaf) for path in problem.paths[:2]]
        handles.append(modules[problem.scored[-1]].register_forward_pre_hook(cut))
        found.clear()
        try:
            with suppress(_Cut):
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        loss = (found[0] * gradient).sum()
        loss.backward()
        return loss.detach()

    batches = [batch for batch, _ in problem.passes]
    model: nn.Module = problem.model
    if problem.shape.vision_layers:
        batches = [embedded(problem, batch) for batch in batches]
        model = problem.model.model.language_model
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return lambda: [run(batch) for batch in ([joined] if together else batches)]


CONTENDERS: dict[str, Callable[[Problem, ExitStack], Step]] = {
    "loop": lambda problem, stack: loop(problem, stack, batch_tasks=False),
    "loop_together": lambda problem, stack: loop(problem, stack, batch_tasks=True),
    "fused": lambda problem, stack: loop(problem, stack, batch_tasks=False, fold=False),
    "folded": lambda problem, stack: loop(problem, stack, batch_tasks=False, fold=True),
    "folded_together": lambda problem, stack: loop(problem, stack, batch_tasks=True, fold=True),
    "fused_together": lambda problem, stack: loop(problem, stack, batch_tasks=True, fold=False),
    "no_early_exit": lambda problem, stack: loop(problem, stack, batch_tasks=False, early_exit=False),
    "checkpointing": lambda problem, stack: loop(problem, stack, batch_tasks=False, checkpointing=True),
    "compiled": lambda problem, stack: loop(problem, stack, batch_tasks=False, compile=True),
    "compiled_together": lambda problem, stack: loop(problem, stack, batch_tasks=True, compile=True),
    "concatenated": concatenated,
    "peft": peft,
    "dense": dense,
    "floor": floor,
    "floor_together": lambda problem, stack: floor(problem, stack, together=True),
    "floor_compiled": lambda problem, stack: floor(problem, stack, compiled=True),
}


def step_of(name: str, problem: Problem, stack: ExitStack) -> Step:
    """A contender's step, to be run and timed outside of any default device."""
    with defaults(problem.on, problem.dtype):
        return CONTENDERS[name](problem, stack)
