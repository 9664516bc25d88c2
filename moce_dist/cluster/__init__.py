"""Turn features into cluster ids: balanced k-means, exact sizes, assignment."""
