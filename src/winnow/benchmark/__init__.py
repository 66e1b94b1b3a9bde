"""Scores a model that a runtime has open, item by item, through lm-eval."""
