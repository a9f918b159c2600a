"""The same federation over Flower: the only room that imports flwr, and not a line of arithmetic in it."""
