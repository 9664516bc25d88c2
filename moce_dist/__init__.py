"""MoCE pre-training as a system: cluster-conditional experts, placed where their images are read."""
