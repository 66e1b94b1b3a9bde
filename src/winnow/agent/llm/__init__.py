"""Steers the search with a language model: it reads a brief, it proposes, and plain code decides what is tried."""
