"""Pretraining: views of cells, stain augmentation, self-supervised losses, the training loop and its launch."""
