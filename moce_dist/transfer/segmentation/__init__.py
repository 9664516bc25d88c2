"""Segmentation: images with masks, UPerNet."""
