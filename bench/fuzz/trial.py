"""What a campaign yields: one trial, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class Trial:
    """One input that was tried.

    Attributes:
        case: what was tried, in one line that builds it again.
        outcome: ``"right"``: the answer agrees with an oracle that shares no code with what is tried; ``"refused"``: an
            error of the kind that the documentation promises, in one line, before anything was written; ``"wrong"``:
            everything else, such as another value, another kind of error, an error that takes more than a second, a
            file that is lost.
        found: of a wrong one, what came out and what was expected; of a refusal, the error.
    """

    case: str
    outcome: Outcome
    found: str = ""
