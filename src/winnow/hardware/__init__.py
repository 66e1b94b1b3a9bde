"""The machine: its processor and GPUs, who may use them, and what energy they take."""
