"""Names the ways in which an architecture stores a matrix of its decoder blocks.

A matrix is a linear layer of torch's own class, one of several experts that checkpoints store separately or stacked in one tensor,
or transposed as in GPT-2. A linear layer of another class goes by the name of that class.
"""

LINEAR, EXPERT, STACKED, TRANSPOSED = "Linear", "expert", "stacked expert", "Conv1D"
ANY = ("any",)
