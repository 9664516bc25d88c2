"""Images to rows of features: decode, frame, encode, one file a shard."""
