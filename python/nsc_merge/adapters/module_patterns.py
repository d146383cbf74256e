"""``rank_pattern`` and ``alpha_pattern`` looked up by PEFT's rule, in bounded time whatever they hold."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Edges followed for one set of patterns and all modules. 2,000 names against 10,000 modules follow 400,000.
_MOST_EDGES = 1_000_000
_MOST_CHARACTERS, _MOST_DEPTH, _MOST_STATES = 1000, 20, 100_000

# Most patterns: known to be a regular expression without asking.
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])*")

_TOKEN = re.compile(
    r"(?P<anchor>\^|\$|\\[AZ])|(?P<open>\((?:\?:)?(?!\?))|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+|\d*,\d*)\})\??(?!\+))"
    r"|(?P<one>\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\\[^A-Za-z0-9]|[^\\\[\](){}*+?|^$.]|[{}\]])"
)


class _Edge(NamedTuple):
    """Of the automaton: ``label`` is a regular expression of one character, an anchor, or "" for none."""

    label: str
    target: int


class _Part(NamedTuple):
    """A piece of the automaton, entered at one state and left at another."""

    first: int
    last: int


class ModulePatterns:
    """Patterns of module names and their values; the first pattern that matches the end of a path, at a dot, wins.

    PEFT asks ``re.match(rf"(.*\\.)?({pattern})$", path)`` for one pattern after another. Here all of them are one
    nondeterministic automaton (K. Thompson, Regular expression search algorithm, CACM 11, 1968) whose sets of states
    are kept as they are met: the same answer, but no backtracking, and names that begin alike are followed once.

    Args:
        patterns: pattern -> value.

    Raises:
        ValueError: if a pattern is no regular expression, if it needs more than characters, classes, groups,
            alternatives, repeats and anchors (PEFT's own ``re`` has look-around and back-references, too), or if it is
            so long, or repeats so often, that matching would take long.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns = patterns
        self._edges: list[list[_Edge]] = []
        self._accepts: dict[int, str] = {}
        self._followed = 0
        self._steps: dict[tuple[int, str], frozenset[int]] = {}
        # Sets of states by number; from one to the next by a character; the pattern that ends in one, if any.
        self._sets: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self._moves: list[dict[str, int]] = []
        self._found: dict[int, str | None] = {}
        # At the start of the path; within what PEFT's (.*\.)? takes; behind a dot.
        self._start, skipped, self._behind = self._state(), self._state(), self._state()
        self._edges[self._start] += [_Edge("", skipped), _Edge("", self._behind)]
        self._edges[skipped] += [_Edge(".", skipped), _Edge(r"\.", self._behind)]
        self._order = {pattern: number for number, pattern in enumerate(patterns)}
        for pattern in patterns:
            part = self._parsed(pattern)
            self._edges[self._behind].append(_Edge("", part.first))
            self._accepts[part.last] = pattern

    def value(self, path: str, default: Any) -> Any:
        """The value for a module, ``default`` if no pattern matches its path.

        Raises:
            ValueError: if matching has taken too long.
        """
        if not self._patterns:
            return default
        at = self._number(frozenset({self._start}))
        for character in path:
            moves = self._moves[at]
            if character not in moves:
                moves[character] = self._number(self._moved(at, character))
            at = moves[character]
        if at not in self._found:
            self._found[at] = self._accepted(at)
        found = self._found[at]
        # Where none matches, PEFT asks for the path itself.
        return self._patterns.get(path, default) if found is None else self._patterns[found]

    def _number(self, states: frozenset[int]) -> int:
        if states not in self._sets:
            self._sets[states] = len(self._moves)
            self._members.append(states)
            self._moves.append({})
        return self._sets[states]

    def _moved(self, at: int, character: str) -> frozenset[int]:
        self._spend(len(self._members[at]))
        return frozenset().union(*(self._step(state, character) for state in self._members[at]))

    def _accepted(self, at: int) -> str | None:
        """The first pattern that ends here."""
        ends = {state for one in self._members[at] for state in self._reached(one, r"\Z")}
        found = [self._accepts[state] for state in ends if state in self._accepts]
        return min(found, key=self._order.__getitem__, default=None)

    def _spend(self, edges: int) -> None:
        self._followed += edges
        if self._followed > _MOST_EDGES:
            raise ValueError(
                f"{len(self._patterns)} patterns take too long to match, expected names of modules rather than "
                f"regular expressions, found {_shown(max(self._patterns, key=len))}"
            )

    def _step(self, state: int, character: str) -> frozenset[int]:
        key = state, character
        if key not in self._steps:
            edges = [edge for one in self._reached(state) for edge in self._edges[one]]
            self._steps[key] = frozenset(edge.target for edge in edges if _takes(edge.label, character))
        return self._steps[key]

    def _reached(self, state: int, end: str = "") -> set[int]:
        """States reached from one without a character; past anchors at the start, and at the end if this is it."""
        passed = {"", *(("^", r"\A") if state == self._start else ()), *(("$", end) if end else ())}
        reached, waiting = {state}, [state]
        while waiting:
            edges = self._edges[waiting.pop()]
            self._spend(len(edges))
            new = {edge.target for edge in edges if edge.label in passed} - reached
            reached |= new
            waiting += new
        return reached

    def _state(self) -> int:
        if len(self._edges) >= _MOST_STATES:
            raise ValueError(f"{len(self._patterns)} patterns are too many or repeat too often to be matched")
        self._edges.append([])
        return len(self._edges) - 1

    def _parsed(self, pattern: str) -> _Part:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"expected patterns of at most {_MOST_CHARACTERS} characters, found {_shown(pattern)}")
        try:
            if not _NAME.fullmatch(pattern):
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{_shown(pattern)} is no regular expression: {error}") from None
        tokens = list(_tokens(pattern))
        steps = ({"open": 1, "close": -1}.get(str(token.lastgroup), 0) for token in tokens)
        if max(itertools.accumulate(steps), default=0) > _MOST_DEPTH:
            raise ValueError(f"expected groups in at most {_MOST_DEPTH} others, found {_shown(pattern)}")
        return self._alternatives(tokens)

    def _alternatives(self, tokens: list[re.Match[str]]) -> _Part:
        """Consumes tokens up to the end of a group, or of all."""
        whole = _Part(self._state(), self._state())
        while True:
            last = self._sequence(tokens, whole.first)
            self._edges[last].append(_Edge("", whole.last))
            if not tokens or tokens.pop(0).lastgroup == "close":
                return whole

    def _sequence(self, tokens: list[re.Match[str]], state: int) -> int:
        while tokens and tokens[0].lastgroup not in ("bar", "close"):
            piece = [tokens.pop(0)]
            if piece[0].lastgroup == "open":
                depth = 1
                while depth:
                    piece.append(tokens.pop(0))
                    depth += {"open": 1, "close": -1}.get(str(piece[-1].lastgroup), 0)
            least: int = 1
            most: int | None = 1
            if tokens and tokens[0].lastgroup == "repeat":
                least, most = _bounds(tokens.pop(0)[0].removesuffix("?") or "?")
            state = self._repeated(piece, least, most, state)
        return state

    def _repeated(self, piece: list[re.Match[str]], least: int, most: int | None, state: int) -> int:
        """The piece ``least`` to ``most`` times, without end if that is None, from a state on; where it ends."""
        for _ in range(least):
            state = self._once(piece, state)
        if most is None:
            loop = self._state()
            self._edges[state].append(_Edge("", loop))
            self._edges[self._once(piece, loop)].append(_Edge("", loop))
            return loop
        if most == least:
            return state
        end = self._state()
        for _ in range(most - least):
            self._edges[state].append(_Edge("", end))
            state = self._once(piece, state)
        self._edges[state].append(_Edge("", end))
        return end

    def _once(self, piece: list[re.Match[str]], state: int) -> int:
        if piece[0].lastgroup == "open":
            group = self._alternatives(piece[1:])
            self._edges[state].append(_Edge("", group.first))
            return group.last
        end = self._state()
        self._edges[state].append(_Edge(piece[0][0], end))
        return end


@functools.lru_cache(maxsize=1 << 16)
def _takes(label: str, character: str) -> bool:
    """Whether an edge takes a character; ``re`` says so, that there is one meaning of classes and escapes."""
    return label not in ("", "^", "$", r"\A", r"\Z") and re.fullmatch(label, character) is not None


def _tokens(pattern: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise ValueError(
                f"{_shown(pattern)} holds {pattern[at : at + 3]!r}: expected characters, classes, groups, "
                "alternatives, repeats and anchors; name the modules instead"
            )
        yield token
        at = token.end()


def _bounds(repeat: str) -> tuple[int, int | None]:
    if repeat in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat]
    least, comma, most = repeat[1:-1].partition(",")
    return int(least or 0), (int(most) if most else None) if comma else int(least)


def _shown(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 60 else f"{pattern[:57]!r}..."
