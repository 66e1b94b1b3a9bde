"""A study and what is computed from it: its space, trials, objectives, front and budget."""
