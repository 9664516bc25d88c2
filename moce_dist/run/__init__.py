"""The run directory: its lease, complete artefacts, file names, and the run it continues from."""
