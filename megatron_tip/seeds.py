"""Seeds derived from one another."""

import numpy as np


def derive_seed(*parts: int) -> int:
    """Returns an unsigned 32-bit seed derived from `parts`; other parts give an unrelated seed."""
    words = [len(parts), *(part % 2**64 for part in parts)]  # numpy pads with zeros: the length distinguishes them
    return int(np.random.SeedSequence(words).generate_state(1)[0])
