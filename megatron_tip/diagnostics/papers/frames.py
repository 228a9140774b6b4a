"""Rows of tables, with the types that pandas leaves open."""

from typing import Any

import numpy as np
import pandas as pd


def rows(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Returns the rows whose columns have the `wanted` values; a list or tuple means any of its values."""
    kept = np.ones(len(table), dtype=bool)
    for name, value in wanted.items():
        values = value if isinstance(value, list | tuple) else [value]
        kept &= table[name].isin(values).to_numpy(dtype=bool)
    found = table.loc[kept]
    assert isinstance(found, pd.DataFrame), "a mask of rows"
    return found


def in_order(table: pd.DataFrame, column: str, names: list[str]) -> pd.DataFrame:
    """Returns one row for each of `names`, values of `column`, in that order; NaN where one is missing."""
    return table.set_index(column).reindex(names)


def numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """Returns a column as `[rows]` float64."""
    return table[column].to_numpy(dtype=np.float64)


def errors(table: pd.DataFrame, value: str = "gain", low: str = "low", high: str = "high") -> np.ndarray:
    """Returns `[2, rows]`: how far the interval reaches below and above the value."""
    middle = numbers(table, value)
    return np.abs(np.stack([middle - numbers(table, low), numbers(table, high) - middle]))
