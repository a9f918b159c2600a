"""Compiled kernels for small convolutional networks on the CPU: optional, made by the machine's own C compiler.

Nothing is compiled on installation. The first use compiles, for this processor, into the cache folder; without a
compiler, or with ``FEDMERGE_NATIVE=0``, torch computes as always and `available` tells the reason. Once loaded, memory
that is freed stays with the process, which makes torch's own steps faster too.
"""

from fedmerge.training.native.build import NoKernelsError
from fedmerge.training.native.functions import available, conv2d
from fedmerge.training.native.layers import accelerated

__all__ = ["NoKernelsError", "accelerated", "available", "conv2d"]
