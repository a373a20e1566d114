"""The search for the front: greedily, by what a change saves for what it loses.

One state is a choice for each site (or none: dense). From the dense model on, the change that saves
most per loss is made next, until nothing is left or the caller has seen enough. What each site
costs alone, or cost when it was last tried, says which few changes are worth trying; the loss of a
state is measured, all its changes together. Costs mostly grow with what else was changed, so a
change that does better than the next one promises is taken without trying that one (Minoux 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

# How many changes are tried together with those made before, at most, for each that is made.
COMPETITORS = 2
# How often in all the changes tried together may leave the limit before the search goes beyond it.
MISSES = 2
# Smaller differences between measured losses (nats) are noise of the trial text.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class Choice:
    """One setting of one site.

    Args:
        site: Name of the site.
        setting: Name of the setting.
        seconds: What the step takes less with it than dense.
        loss: What it costs alone (nats, or a relative error).
        exact: Whether it costs just that; else at least that.
    """

    site: str
    setting: str
    seconds: float
    loss: float
    exact: bool = True


@dataclass(frozen=True)
class State:
    """Settings of some sites.

    Args:
        choices: Site → its choice; other sites are dense.
        loss: Measured, all together.
        seconds: Saved, all together.
    """

    choices: Mapping[str, Choice]
    loss: float
    seconds: float


def search(
    choices: Sequence[Choice],
    measure: Callable[[Mapping[str, Choice]], float],
    enough: Callable[[State], bool],
    sharpen: Callable[[Choice], Choice] = lambda choice: choice,
    limit: float = inf,
) -> list[State]:
    """Return the states on the way from the dense model, in order, and those that left the limit.

    Args:
        choices: Every setting of every site.
        measure: Returns the loss of choices together.
        enough: Says whether to stop behind a state.
        sharpen: Returns a choice with its exact loss. Asked only for those whose least loss looks
            best: the states are the same as if all were exact.
        limit: A loss that matters to the caller. A change that leaves it is put off, as long as
            others may fit; once none may, the way goes on beyond it.
    """
    known = list(choices)
    state = State({}, 0.0, 0.0)
    states = [state]
    added: dict[Choice, float] = {}  # what a change cost when it was last tried
    measured: dict[Choice, State] = {}  # from this state, by the change
    missed = 0
    while not enough(state):
        within = state.loss <= limit and missed < MISSES
        room = limit - state.loss if within else inf
        best: State | None = None
        tried: set[Choice] = set()
        while len(tried) < COMPETITORS:
            least = 0.0 if best is None else _rate(best, state)
            move = _best_promise(known, tried, state, added, sharpen, least, room)
            if move is None:
                break
            tried.add(move)
            if move not in measured:
                measured[move] = _with(state, move, measure)
            new = measured[move]
            added[move] = new.loss - state.loss
            if added[move] <= room and (best is None or _rate(new, state) > least):
                best = new
        if best is not None:
            state = best
            states.append(state)
            measured.clear()
        elif within and tried:
            missed += 1
            states += [measured[move] for move in tried]
        elif within:
            missed = MISSES
        else:
            break
    return states


def _best_promise(
    known: list[Choice],
    tried: Collection[Choice],
    state: State,
    added: Mapping[Choice, float],
    sharpen: Callable[[Choice], Choice],
    least: float,
    room: float,
) -> Choice | None:
    """Return the change that promises most within the room, if that is more than the least.

    Exact choices take the place of others in ``known``.
    """

    def promise(choice: Choice) -> float:
        return max(_alone(choice) - _alone_now(state, choice.site), added.get(choice, 0.0))

    while True:
        moves = [
            c
            for c in known
            if c.seconds > _saved(state, c.site) and c not in tried and promise(c) <= room
        ]
        if not moves:
            return None
        promised = [_worth(state, c, promise(c)) for c in moves]
        most = max(promised)
        if most <= least:
            return None
        move = moves[promised.index(most)]
        if move.exact:
            return move
        known[known.index(move)] = replace(sharpen(move), exact=True)


def pareto(states: Sequence[State]) -> list[State]:
    """Return the states than which none is both faster and better, by rising savings."""
    front: list[State] = []
    for state in sorted(states, key=lambda s: (s.seconds, -s.loss)):
        while front and front[-1].loss >= state.loss:
            front.pop()
        front.append(state)
    return front


def _saved(state: State, site: str) -> float:
    return state.choices[site].seconds if site in state.choices else 0.0


def _alone(choice: Choice) -> float:
    return max(choice.loss, 0.0)


def _alone_now(state: State, site: str) -> float:
    return _alone(state.choices[site]) if site in state.choices else 0.0


def _worth(state: State, move: Choice, loss: float) -> float:
    return (move.seconds - _saved(state, move.site)) / max(loss, RESOLUTION)


def _with(state: State, move: Choice, measure: Callable[[Mapping[str, Choice]], float]) -> State:
    choices = {**state.choices, move.site: move}
    return State(choices, measure(choices), sum(c.seconds for c in choices.values()))


def _rate(new: State, old: State) -> float:
    return (new.seconds - old.seconds) / max(new.loss - old.loss, RESOLUTION)
