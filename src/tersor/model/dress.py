"""Dress: the old name of `fitted`, until core calls that."""

from __future__ import annotations

from tersor.model.fitted import fitted as dress

__all__ = ["dress"]
