"""Finds the Pareto-optimal compressed versions of a language model."""
