"""Training workloads of optimizers.

The first optimizer that torch builds in a process imports its compiler, which takes seconds. Importing it
with the workloads lets the fork server do so once for all cells.
"""

import torch._dynamo as _compiler

__all__ = ["_compiler"]
