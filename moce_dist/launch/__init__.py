"""Run work on many machines: the only package that uses Ray."""
