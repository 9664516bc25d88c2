"""Tars in, batches of (image, cluster_id, key, weight) out."""
