"""The search: it asks an agent, runs trials in child processes, stops those without hope, and reports."""
