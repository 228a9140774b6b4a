"""Token-selective on-policy distillation on Megatron-Core."""

from __future__ import annotations

__version__ = "0.1.0"
