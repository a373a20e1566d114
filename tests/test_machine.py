"""Rates: what the probes do, and what their seconds say."""

from __future__ import annotations

import torch

from nbl_compiler.machine import (
    BLOCK,
    CODES,
    COMPUTE,
    LEAST_WIDTH,
    READ,
    STREAM,
    Probe,
    measure_machine,
)


def small(monkeypatch, **options) -> Probe:
    monkeypatch.setattr("nbl_compiler.machine.NUMBERS", 2**14)
    monkeypatch.setattr("nbl_compiler.machine.CODE_NUMBERS", 2**13)
    monkeypatch.setattr("nbl_compiler.machine.LEAST_WIDTH", 32)
    return Probe(32, **options)


def test_narrow_models_get_a_short_chain() -> None:
    """As of the least width: not thousands of layers."""
    narrow, least = (Probe(width, streamed=False) for width in (8, LEAST_WIDTH))
    seconds = {READ: 1.0, COMPUTE: 1.0}
    assert narrow.machine(seconds) == least.machine(seconds)
    assert narrow.calls[READ]().shape == (1, LEAST_WIDTH)


def test_rates_are_work_over_seconds(monkeypatch) -> None:
    probe = small(monkeypatch, codes=True)
    numbers = 2**14  # 4 pairs of 64 × 32 and 32 × 64
    machine = probe.machine({READ: 2.0, COMPUTE: 4.0, STREAM: 1.0, CODES: 0.5})
    assert machine.bytes_per_second == 4 * numbers / 2
    assert machine.streamed_bytes_per_second == 4 * numbers
    assert machine.flops_per_second == 2 * numbers * BLOCK / 4
    assert machine.codes_per_second == 2 * numbers / 2  # of half as many weights


def test_the_streamed_chain_computes_the_same(monkeypatch) -> None:
    calls = small(monkeypatch).calls
    torch.testing.assert_close(calls[STREAM](), calls[READ]())


def test_codes_are_probed_only_if_asked_for(monkeypatch) -> None:
    probe = small(monkeypatch, codes=True)
    made = probe.calls[CODES]()
    assert made.shape == (1, 32)
    assert made.isfinite().all()
    plain = small(monkeypatch)
    assert CODES not in plain.calls
    assert plain.machine({READ: 1.0, COMPUTE: 1.0, STREAM: 1.0}).codes_per_second == 0


def test_a_reset_of_dynamo_leaves_the_probes_compiled(monkeypatch) -> None:
    call = small(monkeypatch).calls[STREAM]
    compiled = torch._dynamo.utils.counters["inductor"].total()
    torch._dynamo.reset()
    call()
    assert torch._dynamo.utils.counters["inductor"].total() == compiled


def test_without_streaming_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.setattr("nbl_compiler.machine.NUMBERS", 2**14)
    state = torch.get_rng_state()
    machine = measure_machine(repeats=1, width=32, streamed=False)
    assert machine.bytes_per_second > 0
    assert machine.streamed_bytes_per_second == 0
    assert torch.equal(torch.get_rng_state(), state)
