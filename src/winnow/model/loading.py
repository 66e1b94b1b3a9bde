"""How weights come into memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loading:
    """How weights come into memory."""

    dtype: str = "auto"
    attention: str = "auto"  # sdpa where the architecture knows it, else eager
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def attn_implementation(self) -> str | None:
        """As transformers is told; None leaves the choice to it."""
        return None if self.attention == "auto" else self.attention
