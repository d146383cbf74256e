"""Saves that are killed, or started two at a time: every folder and file is an old or a new one, whole.

What each save makes of each folder is known from a run that nobody disturbs, in a folder of its own; a trial compares
digests of all files, those of a user among them.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch

from nsc_merge.descent.checkpoint import State
from nsc_merge.utils.atomic_file import write_text

from .killed_process import Child
from .small_merges import Save, faults, saves
from .trial import Outcome, Trial

MINE = ("notes.txt", "lora/tokenizer.json", "heads/mine.safetensors", "model/deep/x", "tasks/plan")
_NOTHING = "nothing"


def trials(seed: int) -> Iterator[Trial]:
    """Endless trials, the same for a seed as far as moments in time can be."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folders = _Folders(Path(folder), saves())
        kinds: list[Callable[[random.Random, str], Trial]] = [
            folders.one_killed,
            folders.two_at_once,
            partial(_file_killed, Path(folder) / "files"),
        ]
        for number in count():
            kind = chance.choices(kinds, (5, 4, 1))[0]
            yield kind(chance, f"seed {seed} trial {number}")


class _Folders:
    """Folders as undisturbed saves leave them, by a digest of all that is in them."""

    def __init__(self, place: Path, known: dict[str, Save]) -> None:
        self._place, self._saves = place, known
        self._after: dict[tuple[str, str], tuple[str, int, float]] = {}
        (place / _NOTHING).mkdir()
        mine = place / "mine"
        for name in MINE:
            (mine / name).parent.mkdir(parents=True, exist_ok=True)
            (mine / name).write_text(f"mine: {name}")
        digest = _digest(mine)
        mine.rename(place / digest)
        empty = [_NOTHING, digest]
        self._starts = [*empty, *(self.after(start, name)[0] for start in empty for name in known)]

    def after(self, start: str, name: str) -> tuple[str, int, float]:
        """What a save makes of a folder: its digest, and how many changes and seconds it takes."""
        if (start, name) not in self._after:
            out = self._copy(start)
            child = Child(partial(self._saves[name].to, out), self._place / "answer")
            how, what = child.wait()
            digest = _digest(out)
            if (how == "refused" and digest != start) or how not in ("done", "refused"):
                raise AssertionError(f"{name} over {start}: {how}: {what}")
            if how == "done" and (wrong := faults(self._saves[name], out)):
                raise AssertionError(f"{name} over {start}: {wrong}")
            if not (self._place / digest).exists():
                shutil.copytree(out, self._place / digest, symlinks=True)
            self._after[start, name] = digest, int(what) if how == "done" else 1, child.seconds
        return self._after[start, name]

    def one_killed(self, chance: random.Random, title: str) -> Trial:
        """A save is killed before one of its changes, or at some time; another follows."""
        start, name, then = chance.choice(self._starts), chance.choice([*self._saves]), chance.choice([*self._saves])
        new, changes, seconds = self.after(start, name)
        dies_at = chance.randrange(changes + 1) if chance.random() < 0.7 else None
        moment = chance.uniform(0, seconds) if dies_at is None else None
        when = f"before change {dies_at}" if moment is None else f"after {moment:.4f} s"
        case = f"{title}: {name} over {start[:8]}, killed {when}; then {then}"
        out = self._copy(start)
        child = Child(partial(self._saves[name].to, out), self._place / "answer", dies_at=dies_at)
        if moment is not None:
            time.sleep(moment)
            child.kill()
        how, what = child.wait()
        found = _digest(out)
        if how not in ("killed", "done", "refused") or found not in (start, new) or (how == "done" and found != new):
            return Trial(case, "wrong", f"{how}: {what}; {self._difference(out, start, new)}")
        if shown := [path.name for path in out.parent.glob(".*/config.json")]:
            return Trial(case, "wrong", f"left beside it, to be taken for a model: {shown}")
        how, what = Child(partial(self._saves[then].to, out), self._place / "answer").wait()
        return self._ended(case, out, [self.after(found, then)[0]], how, what)

    def two_at_once(self, chance: random.Random, title: str) -> Trial:
        """Two saves start at the same time, and one of them may be killed."""
        start, names = chance.choice(self._starts), chance.choices([*self._saves], k=2)
        killed = chance.randrange(2) if chance.random() < 0.3 else None
        moment = chance.uniform(0, max(self.after(start, name)[2] for name in names))
        case = f"{title}: {' and '.join(names)} over {start[:8]} at once"
        case += "" if killed is None else f", number {killed} killed after {moment:.4f} s"
        out = self._copy(start)
        gate = os.pipe()
        children = [
            Child(partial(self._saves[name].to, out), self._place / f"answer{i}", gate=gate)
            for i, name in enumerate(names)
        ]
        os.close(gate[0])
        os.close(gate[1])
        if killed is not None:
            time.sleep(moment)
            children[killed].kill()
        ends = [child.wait() for child in children]
        for how, what in ends:
            if how not in ("done", "refused", "killed") or "\n" in what:
                return Trial(case, "wrong", f"{how}: {what}")
        # Those that are done did it one after the other; one that was killed may have come to the end, or not.
        done = [name for name, (how, _) in zip(names, ends, strict=True) if how == "done"]
        maybe = [name for name, (how, _) in zip(names, ends, strict=True) if how == "killed"]
        orders = [done, done[::-1], [*done, *maybe], [*maybe, *done]]
        outcomes = [self._after_all(start, order) for order in orders]
        refusals = [what for how, what in ends if how == "refused"]
        alone = [self.after(start, name)[0] == start for name in names]
        if not done and killed is None and not any(alone):
            return Trial(case, "wrong", f"nobody saved: {ends}")
        if maybe:
            found = _digest(out)
            return Trial(case, "right") if found in outcomes else Trial(case, "wrong", self._difference(out, *outcomes))
        return self._ended(case, out, outcomes, "refused" if refusals else "done", "; ".join(refusals))

    def _after_all(self, start: str, names: list[str]) -> str:
        for name in names:
            start = self.after(start, name)[0]
        return start

    def _ended(self, case: str, out: Path, expected: list[str], how: str, what: str) -> Trial:
        """Of writers that came to their end: what is there, and that nothing is left beside it."""
        if how not in ("done", "refused") or _digest(out) not in expected:
            return Trial(case, "wrong", f"{how}: {what}; {self._difference(out, *expected)}")
        if left := [path.name for path in out.parent.iterdir() if path != out]:
            return Trial(case, "wrong", f"left beside it: {left}")
        outcome: Outcome = "right" if how == "done" else "refused"
        return Trial(case, outcome, what)

    def _copy(self, start: str) -> Path:
        place = self._place / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if start != _NOTHING:
            shutil.copytree(self._place / start, place / "out", symlinks=True)
        return place / "out"

    def _difference(self, out: Path, *expected: str) -> str:
        """Files that no expected folder holds so, and those that are missing from the nearest."""
        found = _files(out)
        known = [_files(self._place / digest) for digest in expected]
        nearest = min(known, key=lambda files: len(files.items() ^ found.items()))
        return f"differ: {sorted({name for name, _ in nearest.items() ^ found.items()})}"


def _file_killed(place: Path, chance: random.Random, title: str) -> Trial:
    """A state, or a table, is written over an older one and killed meanwhile."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    file, size = place / "some.safetensors", chance.choice((1, 1000, 30_000))
    problem = {"modules": list(range(size)), "tasks": ["a"]}

    def state(value: int) -> State:
        lam = torch.full((size, 1), float(value))
        tensors = {"lam": lam, "start": lam.clone(), "dead": lam.isnan(), "rng": torch.get_rng_state()}
        return State(0, tensors, [], problem, False)

    def written(value: int) -> None:
        if kind == "text":
            write_text(file, str(value) * size)
        else:
            state(value).save(file)

    def read() -> int:
        """The value whose file it is, 0 if it is none's."""
        if kind == "text":
            text = file.read_text()
            return int(text[0]) if text in ("1" * size, "2" * size) else 0
        try:
            lam = State.load(file, problem).tensors["lam"]
        except ValueError:
            return 0
        return int(lam[0]) if bool(lam.eq(lam[0]).all()) else 0

    kind = chance.choice(("state", "text"))
    written(1)
    dies_at = chance.randrange(6)
    case = f"{title}: {kind} of {size} killed before change {dies_at}"
    how, what = Child(partial(written, 2), place / "answer", dies_at=dies_at).wait()
    if how not in ("killed", "done") or read() not in ((1, 2) if how == "killed" else (2,)):
        return Trial(case, "wrong", f"{how}: {what}")
    return Trial(case, "right")


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _digest(folder: Path) -> str:
    if not folder.exists():
        return _NOTHING
    return hashlib.sha256(repr(_files(folder)).encode()).hexdigest()
