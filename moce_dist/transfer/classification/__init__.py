"""Classification: labelled images, fine-tuning and frozen protocols."""
