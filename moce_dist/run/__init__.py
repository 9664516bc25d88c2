"""The run directory: who writes there, what is complete, names, where a run goes on from."""
