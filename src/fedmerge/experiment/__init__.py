"""Configuration, the round loop, and the record a run leaves behind."""
