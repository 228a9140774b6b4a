"""Seeds that follow from one another."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """An unsigned 32-bit seed that follows from `parts`; other parts, an unrelated seed."""
    words = [len(parts), *(part % 2**64 for part in parts)]  # numpy fills up with zeros: the length tells them apart
    return int(np.random.SeedSequence(words).generate_state(1)[0])
