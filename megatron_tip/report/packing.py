"""Encoding of numbers and text in the page: bytes, deflated, in base64, which is safe in HTML."""

import base64
import json
import zlib
from typing import Any

import numpy as np

MISSING = 0xFFFF
"""The thousandth that stands for a missing value."""
COARSE_MISSING = 0xFF
LEAST, MOST = 1e-3, 65.534


def packed(content: bytes, *, level: int = 6) -> str:
    """Returns `content` deflated (zlib's format) and in base64; page/decode.js is the inverse."""
    return base64.b64encode(zlib.compress(content, level)).decode("ascii")


def packed_json(value: Any) -> str:
    """Returns `value` as packed JSON; refuses NaN and infinity."""
    return packed(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())


def planes(values: np.ndarray, num_bytes: int) -> bytes:
    """Returns non-negative integers as byte planes, all lowest bytes first: they compress better this way."""
    wide = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return wide[:, :num_bytes].T.tobytes()


def thousandths(values: np.ndarray) -> np.ndarray:
    """Returns floats as whole thousandths, at most MISSING - 1 (MOST or more), and MISSING for NaN."""
    whole = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0.0, (MISSING - 1) / 1000) * 1000)
    return np.where(np.isnan(values), MISSING, whole).astype(np.uint32)


def coarse(values: np.ndarray) -> np.ndarray:
    """Returns non-negative floats as one byte, by logarithm, within 2.2 %; 0: below LEAST; COARSE_MISSING: NaN."""
    steps = np.log(np.clip(np.nan_to_num(values, nan=LEAST), LEAST, MOST) / LEAST) / np.log(MOST / LEAST)
    codes = np.where(values < LEAST, 0, 1 + np.rint(steps * (COARSE_MISSING - 2)))
    return np.where(np.isnan(values), COARSE_MISSING, codes).astype(np.uint32)


def coarse_shares(shares: np.ndarray) -> np.ndarray:
    """Returns shares in [0, 1] as one byte, by square root: accurate to 0.004, and finer for small shares."""
    return np.rint(255 * np.sqrt(np.clip(shares, 0.0, 1.0))).astype(np.uint32)
