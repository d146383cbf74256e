"""Campaigns side by side, each in a process of its own that is started again where it dies."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.fuzz.trial import Trial

CAMPAIGNS = {name: f"bench.fuzz.{name}" for name in ("operator", "merges", "adapters", "files", "kills")}
HUNG = 60.0  # seconds without a trial, the start of a process not counted
START = 180.0


class Campaign:
    """One campaign's process, started again with another seed where it dies; ``module`` has its ``trials(seed)``."""

    def __init__(self, name: str, module: str, seed: int, trials: int | None) -> None:
        self.name, self._module, self._seed, self._left = name, module, seed, trials
        self.counts: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_work, args=(self._module, self._seed, self._left, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._done, self._until = 0, time.monotonic() + START

    def received(self) -> Iterator[Trial]:
        """What has come since; a death is a trial that went wrong."""
        try:
            while self.connection.poll():
                trial = self.connection.recv()
                self._done += 1
                self._until = time.monotonic() + HUNG
                yield self._counted(trial)
        except EOFError:
            self._process.join()
            if self._process.exitcode == 0:
                self.connection.close()
            else:
                yield self._over(f"the process ended with status {self._process.exitcode}")

    def check(self) -> Iterator[Trial]:
        """A trial that takes too long, if one does."""
        if not self.ended and time.monotonic() > self._until:
            self._process.kill()
            self._process.join()
            yield self._over(f"no answer in {HUNG:.0f} s")

    def _over(self, how: str) -> Trial:
        trial = Trial(f"seed {self._seed}, trial {self._done}", "wrong", how)
        self.connection.close()
        self._left = None if self._left is None else self._left - self._done - 1
        self._seed += 1
        # What dies before its first trial cannot start at all.
        if self._done and (self._left is None or self._left > 0):
            self._start()
        return self._counted(trial)

    def _counted(self, trial: Trial) -> Trial:
        self.counts[trial.outcome] += 1
        return trial

    @property
    def ended(self) -> bool:
        return self.connection.closed

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(module: str, seed: int, trials: int | None, connection: Connection) -> None:
    for number, trial in enumerate(importlib.import_module(module).trials(seed), 1):
        try:
            connection.send(trial)
        except BrokenPipeError:
            return
        if number == trials:
            return


def run(
    modules: Mapping[str, str], seed: int, seconds: float, trials: int | None, out: Path | None
) -> dict[str, Counter[str]]:
    """Run campaigns until the time is up or each has done its trials; returns outcome -> number, by campaign."""
    campaigns = [Campaign(name, module, seed, trials) for name, module in modules.items()]
    started = said = time.monotonic()
    try:
        while (now := time.monotonic()) - started < seconds:
            running = [campaign for campaign in campaigns if not campaign.ended]
            if not running:
                break
            ready = wait([campaign.connection for campaign in running], timeout=1.0)
            for campaign in running:
                for trial in campaign.received() if campaign.connection in ready else campaign.check():
                    if trial.outcome == "wrong":
                        _report(campaign.name, trial, out)
            if now - said > (1 if sys.stderr.isatty() else 60):
                said = now
                _say(campaigns, now - started)
    except KeyboardInterrupt:
        pass
    finally:
        for campaign in campaigns:
            if not campaign.ended:
                campaign.stop()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {campaign.name: campaign.counts for campaign in campaigns}


def _report(name: str, trial: Trial, out: Path | None) -> None:
    print(f"\n{name}: {trial.case}\n    {trial.found}", file=sys.stderr, flush=True)
    if out is not None:
        with (out / "wrong.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"campaign": name, **asdict(trial)}) + "\n")


def _say(campaigns: list[Campaign], seconds: float) -> None:
    figures = ", ".join(
        f"{campaign.name} {campaign.counts.total()} ({campaign.counts['wrong']} wrong)" for campaign in campaigns
    )
    line = f"{seconds:.0f} s: {figures}"
    print(f"\r{line}\033[K" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
    sys.stderr.flush()
