"""Images to cluster ids: features, balanced k-means, assignment."""
