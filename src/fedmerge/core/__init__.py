"""The mathematics of merging, the flat parameter vector, and what flows between server and clients."""
