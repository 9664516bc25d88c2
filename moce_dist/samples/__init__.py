"""The `sample:NAME` sets, built from images that installed packages contain."""
