"""How an architecture holds a matrix of its decoder blocks.

A linear layer of torch's own class, one of a stack of experts that checkpoints hold apart or as one tensor, or transposed as in
GPT-2; a linear layer of a class of its own goes by that class's name.
"""

LINEAR, EXPERT, STACKED, TRANSPOSED = "Linear", "expert", "stacked expert", "Conv1D"
ANY = ("any",)
