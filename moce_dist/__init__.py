"""MoCE pre-training as a system: cluster-conditional experts, placed where images are read."""
