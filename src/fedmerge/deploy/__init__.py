"""Federations across machines, on Flower (``fedmerge[flower]``): their folders, keys, processes and messages."""
