"""A language model that steers the search: it is briefed, it proposes, and plain code decides what of that is tried."""
