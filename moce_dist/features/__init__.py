"""Turn images into rows of features: decode, frame, encode, one file per shard."""
