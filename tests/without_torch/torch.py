"""Stands before PyTorch, which the linters and comparisons have installed and the runtime does without.

TensorBoard's writer would import it if it could, for three seconds of each command's start.
"""

raise ModuleNotFoundError("No module named 'torch'", name="torch")
