"""Other ways to a smaller or faster model: one recipe a file, each from a dense model to that peer.

Every docstring names the paper and says whether this is its own package or the published recipe,
implemented here. A recipe never changes the model it is given: it works on a copy that shares all
parameters it does not replace.
"""
