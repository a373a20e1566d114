"""The search for the front: greedily, by what a change saves for what it loses.

One state is a choice for each site (or none: dense). From the dense model on, the change that saves
most per loss is made next, until nothing is left or the caller has seen enough. What each site
costs alone, or cost when it was last tried, says which few changes are worth trying; the loss of a
state is measured, all its changes together. Costs mostly grow with what else was changed, so a
change that does better than the next one promises is taken without trying that one (Minoux 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# How many changes are tried together with those made before, at most, for each that is made.
COMPETITORS = 2
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
    """

    site: str
    setting: str
    seconds: float
    loss: float


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
) -> list[State]:
    """Return the states on the way from the dense model, in order.

    Args:
        choices: Every setting of every site.
        measure: Returns the loss of choices together.
        enough: Says whether to stop behind a state.
    """
    state = State({}, 0.0, 0.0)
    states = [state]
    added: dict[Choice, float] = {}  # what a change cost when it was last tried
    while not enough(state):
        moves = [c for c in choices if c.seconds > _saved(state, c.site)]
        if not moves:
            break
        promised = {
            c: _worth(state, c, max(_alone(c) - _alone_now(state, c.site), added.get(c, 0.0)))
            for c in moves
        }
        best: tuple[float, State] | None = None
        for move in sorted(moves, key=lambda c: promised[c], reverse=True)[:COMPETITORS]:
            if best is not None and best[0] >= promised[move]:
                break
            new = _with(state, move, measure)
            added[move], rate = new.loss - state.loss, _rate(new, state)
            if best is None or rate > best[0]:
                best = rate, new
        assert best is not None
        state = best[1]
        states.append(state)
    return states


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
