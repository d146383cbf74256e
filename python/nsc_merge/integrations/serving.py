"""Whether vLLM, SGLang, LoRAX and llama.cpp serve an adapter as it is, by their own rules, without them or a GPU.

    from nsc_merge.integrations.serving import check

    check("merged/lora", "sglang").problems         # () where it is served as it is
    check("merged/lora", "sglang").flags            # '--enable-lora --max-lora-rank 16 --lora-target-modules ...'

or ``python -m nsc_merge.integrations.serving merged/lora --server sglang``. :func:`write_uniform` writes the same
update as a server takes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsc_merge.results.beside.serving import llama_cpp, lorax, sglang, uniform, vllm
from nsc_merge.results.beside.serving.outline import AS_A_MODEL, REFUSED, Outline, Problem, read_outline

SERVERS = ("vllm", "sglang", "lorax", "llama.cpp")


@dataclass(frozen=True)
class Check:
    """What one server makes of one adapter.

    Attributes:
        server: its name.
        problems: what keeps it from serving the update as it is; empty if nothing does.
        flags: what it must be told to serve the adapter (LoRAX: in a request; llama.cpp: and what converts it), where
            it is not refused.
    """

    server: str
    problems: tuple[Problem, ...]
    flags: str

    def __str__(self) -> str:
        told = [f"{self.server}: {self.flags}"] if self.flags else []
        return "\n".join([*told, *(f"{self.server}: {problem}" for problem in self.problems)])


def check(
    folder: str | Path,
    server: str = "vllm",
    base: str | Path | Mapping[str, Any] | None = None,
    max_rank: int | None = None,
    shards: int = 1,
) -> Check:
    """Hold an adapter against a server's rules; only its configuration and the header of its tensors are read.

    The rules are those of vLLM 0.33, SGLang 0.5.23, LoRAX of May 2026 and llama.cpp at 0b03adaa (of embeddings and
    heads at 0c1e570). What vLLM and llama.cpp make of adapters when they are run whole: docs/swap_ins.md.

    Args:
        folder: of the adapter, in PEFT's format.
        server: ``"vllm"``, ``"sglang"``, ``"lorax"`` or ``"llama.cpp"``.
        base: the base model's folder, or its configuration as a mapping; by default the folder that the adapter names,
            if it is there. Without one, what depends on it (number of layers, kind of model) is not checked.
        max_rank: the server's ``--max-lora-rank``; by default what holds the adapter. LoRAX and
            llama.cpp have none.
        shards: GPUs that serve one model (LoRAX pads ranks by it).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, or an argument is none of the above.
    """
    _check_arguments(server, shards, max_rank)
    outline = read_outline(Path(folder), base)
    problems = tuple(_problems(outline, server, max_rank, shards))
    refused = any(problem.effect == REFUSED for problem in problems)
    return Check(server, problems, "" if refused else _flags(outline, server, Path(folder)))


def _flags(outline: Outline, server: str, folder: Path) -> str:
    if server == "lorax":
        return lorax.flags(folder)
    if server == "llama.cpp":
        return llama_cpp.flags(folder)
    return (vllm if server == "vllm" else sglang).flags(outline)


def _problems(outline: Outline, server: str, max_rank: int | None, shards: int) -> list[Problem]:
    if not outline.base.writes:
        what = f"a model of {outline.base.kind} that neither generates text nor classifies it"
        return [Problem(REFUSED, what, AS_A_MODEL)]
    if server == "lorax":
        return lorax.problems(outline, shards)
    if server == "llama.cpp":
        return llama_cpp.problems(outline)
    return (vllm if server == "vllm" else sglang).problems(outline, max_rank)


def write_uniform(
    folder: str | Path,
    out: str | Path,
    server: str,
    base: str | Path | Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Check:
    """Write an adapter with the same updates as a server takes it: one rank, padded with zeros, and a scaling of 1.

    Returns:
        :func:`check` of what was written, in float32, with PEFT's configuration.

    Args:
        folder: of the adapter, LoRA on linears and, but for LoRAX, embeddings.
        out: another folder, which is written as a whole.
        server: as in :func:`check`.
        base: as in :func:`check`.
        shards: as in :func:`check`.

    Raises:
        ValueError: naming what else the adapter has (DoRA, biases, modules_to_save, LoRA on parameters; for LoRAX,
            on embeddings), or a linear whose size only ``base`` would tell; before anything is written.
    """
    _check_arguments(server, shards, None)
    uniform.write_uniform(Path(folder), Path(out), server, base, shards)
    return check(out, server, base, shards=shards)


def _check_arguments(server: str, shards: int, max_rank: int | None) -> None:
    if server not in SERVERS:
        raise ValueError(f"server: expected one of {list(SERVERS)}, found {server!r}")
    for name, value in (("shards", shards), ("max_rank", max_rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if every server asked for takes the adapter as it is, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m nsc_merge.integrations.serving",
        description="Whether servers take an adapter as it is, by their rules; exits with 1 where one does not.",
    )
    parser.add_argument("folder", help="an adapter in PEFT's format")
    parser.add_argument("--server", action="append", choices=SERVERS, help="may be given again; all by default")
    parser.add_argument("--base", help="folder of the base model; by default the one that the adapter names")
    parser.add_argument("--max-rank", type=int, help="the server's --max-lora-rank")
    parser.add_argument("--shards", type=int, default=1, help="GPUs that serve one model (LoRAX)")
    parser.add_argument("--write", metavar="OUT", help="write the same update as the one server given takes it, to OUT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    servers = given.server or list(SERVERS)
    if given.write and len(servers) > 1:
        parser.error("--write: expected one --server, whose form is written")
    try:
        if given.write:
            found = [write_uniform(given.folder, given.write, servers[0], given.base, given.shards)]
        else:
            found = [check(given.folder, one, given.base, given.max_rank, given.shards) for one in servers]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(one) for one in found], indent=2) if given.json else "\n".join(map(str, found)))
    return int(any(one.problems for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
