"""Random trials, for as long as you like, of what must never be wrong without a word.

    python -m bench.fuzz                                    all campaigns side by side, for an hour
    python -m bench.fuzz operator --minutes 5               one of them
    python -m bench.fuzz --trials 2000 --seed 7 --json      a number of trials each, and the counts as JSON

Campaigns, each in a process of its own:
    operator    merged LoRA, statistics and gradients of random problems, against NumPy in float64
    merges      methods that need no data, with random options on random updates, against NumPy; and what no merge may
                depend on
    adapters    adapters that PEFT makes, of random kinds and families, merged, saved and loaded again, against PEFT
    files       adapters, batches, results and recipes with bits, keys and values changed, against a reader of its own
    kills       saves that are killed at a random moment, or meet in one folder

A trial ends right, refused (an error of the promised kind, in one line, within a second) or wrong. Wrong are also a
process that dies and a trial that takes a minute. Wrong trials are printed and go to OUT/wrong.jsonl; the exit status
is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench.fuzz.campaigns import CAMPAIGNS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; all by default")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long at most (60)")
    parser.add_argument("--trials", type=int, help="how many of each campaign at most")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (0)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for wrong.jsonl")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = parser.parse_args()
    unknown = sorted(set(args.campaigns) - CAMPAIGNS.keys())
    if unknown:
        parser.error(f"CAMPAIGN: expected some of {', '.join(CAMPAIGNS)}, found {unknown[0]}")
    if args.trials is not None and args.trials < 1:
        parser.error(f"--trials: expected at least 1, found {args.trials}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: CAMPAIGNS[name] for name in args.campaigns or CAMPAIGNS}
    counts = run(chosen, args.seed, 60 * args.minutes, args.trials, args.out)
    rows = {
        name: {"trials": one.total(), **{outcome: one[outcome] for outcome in ("right", "refused", "wrong")}}
        for name, one in counts.items()
    }
    if args.json:
        print(json.dumps(rows))
    else:
        print(f"{'campaign':<10}{'trials':>10}{'right':>10}{'refused':>10}{'wrong':>8}")
        for name, row in rows.items():
            print(f"{name:<10}{row['trials']:>10}{row['right']:>10}{row['refused']:>10}{row['wrong']:>8}")
    return 1 if any(one["wrong"] for one in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
