"""A language model: loading, saving, its files, its architecture, its formats."""
