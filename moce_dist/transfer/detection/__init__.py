"""Detection: images with boxes and masks, a ViT with a pyramid and R-CNN."""
