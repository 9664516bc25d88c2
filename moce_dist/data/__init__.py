"""From tars of images to the batches that a rank trains on."""
