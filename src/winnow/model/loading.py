"""Defines the settings for loading weights into memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loading:
    """Settings for loading weights into memory."""

    dtype: str = "auto"
    attention: str = "auto"  # sdpa if the architecture supports it, else eager
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation for transformers; None leaves the choice to it."""
        return None if self.attention == "auto" else self.attention
