"""The search for the front, on losses that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from nbl_compiler.planning.search import (
    COMPETITORS,
    MISSES,
    RESOLUTION,
    Choice,
    State,
    pareto,
    search,
)


def choices_of(numbers: list[tuple[float, float]]) -> list[Choice]:
    """Return one choice a site."""
    return [Choice(str(i), "on", seconds, loss) for i, (seconds, loss) in enumerate(numbers)]


def added(choices: Mapping[str, Choice]) -> float:
    return sum(choice.loss for choice in choices.values())


def never(_: State) -> bool:
    return False


numbers = st.tuples(st.floats(0.1, 10), st.floats(0.01, 1))


@given(st.lists(numbers, min_size=1, max_size=6))
def test_additive_losses_are_taken_by_their_rate(given_numbers: list[tuple[float, float]]) -> None:
    states = search(choices_of(given_numbers), added, never)
    assert [len(state.choices) for state in states] == list(range(len(given_numbers) + 1))
    rates = [(new.seconds - old.seconds) / (new.loss - old.loss) for old, new in pairwise(states)]
    for earlier, later in pairwise(rates):
        assert later <= earlier * (1 + 1e-9)


def test_a_site_may_change_its_setting_for_a_faster_one() -> None:
    choices = [
        Choice("a", "mild", 1.0, 0.01),
        Choice("a", "strong", 2.0, 1.0),
        Choice("b", "mild", 1.0, 0.02),
    ]
    states = search(choices, added, never)
    names = [{site: c.setting for site, c in state.choices.items()} for state in states]
    assert names == [
        {},
        {"a": "mild"},
        {"a": "mild", "b": "mild"},
        {"a": "strong", "b": "mild"},
    ]
    assert states[-1].seconds == 3.0


def test_what_is_bad_together_is_not_put_together() -> None:
    """a and b look best, but not both; so c comes second."""
    choices = choices_of([(1.0, 0.010), (1.0, 0.011), (1.0, 0.012)])

    def measure(chosen: Mapping[str, Choice]) -> float:
        return added(chosen) + (5.0 if {"0", "1"} <= set(chosen) else 0.0)

    states = search(choices, measure, lambda state: len(state.choices) == 2)
    assert set(states[-1].choices) == {"0", "2"}


def test_a_change_that_keeps_its_promise_is_taken_without_trying_the_next() -> None:
    """One trial a change where losses add up; two where the best one costs more than alone."""
    choices = choices_of([(1.0, 0.01), (1.0, 0.02), (1.0, 0.04)])
    tried: list[set[str]] = []

    def measure(chosen: Mapping[str, Choice]) -> float:
        tried.append(set(chosen))
        return added(chosen) + (0.03 if {"0", "1"} <= set(chosen) else 0.0)

    states = search(choices, measure, never)
    assert [set(state.choices) for state in states] == [set(), {"0"}, {"0", "2"}, {"0", "1", "2"}]
    assert tried == [{"0"}, {"0", "1"}, {"0", "2"}, {"0", "1", "2"}]


def test_the_search_ends_where_the_caller_has_seen_enough() -> None:
    choices = choices_of([(1.0, 0.1)] * 5)
    states = search(choices, added, lambda state: state.loss > 0.25)
    assert [len(state.choices) for state in states] == [0, 1, 2, 3]


def test_a_change_that_leaves_the_limit_makes_room_for_one_that_does_not() -> None:
    """b saves more for its loss, but leaves the limit together with a; c does not."""
    choices = choices_of([(10.0, 0.05), (10.0, 0.06), (1.0, 0.02)])

    def measure(chosen: Mapping[str, Choice]) -> float:
        return added(chosen) + (0.05 if {"0", "1"} <= set(chosen) else 0.0)

    def second(limit: float) -> set[str]:
        return set(search(choices, measure, never, limit=limit)[2].choices)

    assert second(inf) == {"0", "1"}
    assert second(0.08) == {"0", "2"}


def test_where_nothing_fits_the_search_goes_beyond_the_limit() -> None:
    choices = choices_of([(1.0, 0.01), (1.0, 0.02), (1.0, 0.04)])
    states = search(choices, added, lambda state: state.loss > 0.02, limit=0.02)
    assert [set(state.choices) for state in states] == [set(), {"0"}, {"0", "1"}]


def test_few_trials_are_spent_on_what_may_fit() -> None:
    """All but the first promise to fit and do not: four are tried, and two on the way beyond."""
    choices = choices_of([(9.0, 0.01), *((1.0 + i, 0.01) for i in range(6))])
    tried: list[frozenset[str]] = []

    def measure(chosen: Mapping[str, Choice]) -> float:
        tried.append(frozenset(chosen))
        return 0.01 + 0.1 * (len(chosen) - 1)

    states = search(choices, measure, lambda state: state.loss > 0.1, limit=0.1)
    assert len(tried) == len(set(tried)) == 1 + COMPETITORS * (MISSES + 1)
    assert len(states) == 2 + COMPETITORS * MISSES + 1
    assert all(state.loss > 0.1 for state in states[2:])


def test_losses_below_the_resolution_are_alike() -> None:
    """A loss of -0.0001 nats is luck: it must not make a tiny saving the best of all."""
    choices = [Choice("a", "on", 0.01, -RESOLUTION / 10), Choice("b", "on", 1.0, RESOLUTION / 2)]
    states = search(choices, added, lambda state: len(state.choices) == 1)
    assert set(states[-1].choices) == {"b"}


@given(st.lists(st.tuples(numbers, st.floats(0, 1)), min_size=1, max_size=6))
def test_least_losses_lead_the_same_way(given_numbers: list[tuple[tuple[float, float], float]]):
    """Losses that are exact only for those that look best: the states are those of exact losses."""
    exact = choices_of([pair for pair, _ in given_numbers])
    least = [
        replace(choice, loss=share * choice.loss, exact=False)
        for choice, (_, share) in zip(exact, given_numbers, strict=True)
    ]

    def measure(chosen: Mapping[str, Choice]) -> float:
        known = sum(exact[int(site)].loss for site in chosen)
        return known + 0.1 * len(chosen) ** 2

    asked: list[str] = []

    def sharpen(choice: Choice) -> Choice:
        asked.append(choice.site)
        return exact[int(choice.site)]

    def path(states: list[State]) -> list[list[str]]:
        return [list(state.choices) for state in states]

    assert path(search(least, measure, never, sharpen)) == path(search(exact, measure, never))
    assert len(asked) == len(set(asked))


def test_what_never_looks_best_is_never_made_exact() -> None:
    good, bad = Choice("a", "on", 1.0, 0.01), Choice("b", "on", 1.0, 0.5, exact=False)

    def refuse(choice: Choice) -> Choice:
        raise AssertionError(choice.site)

    (_, state) = search([good, bad], added, lambda state: len(state.choices) == 1, refuse)
    assert set(state.choices) == {"a"}


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    states = [State({}, loss, seconds) for seconds, loss in pairs]
    front = pareto(states)

    def beaten(state: State) -> bool:
        return any(
            other.seconds >= state.seconds
            and other.loss <= state.loss
            and (other.seconds, other.loss) != (state.seconds, state.loss)
            for other in states
        )

    expected = {(s.seconds, s.loss) for s in states if not beaten(s)}
    assert {(s.seconds, s.loss) for s in front} == expected
    assert [s.seconds for s in front] == sorted(s.seconds for s in front)
    assert len(front) == len(expected)
