"""Value states that tests choose: of the older kind, and mixed values."""

from __future__ import annotations

import pytest

from nbl_compiler.value_states import States

SOME = States(taps=2, averages=True)
MIXED = States(mixed=True)
both = pytest.mark.parametrize("states", [SOME, MIXED], ids=str)

# As in ``test_oracle``; states add four products as large as the map's own to each output.
ROUNDING = 1e-4
