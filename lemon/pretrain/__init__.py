"""Pretraining: self-supervised losses, the training loop and its launch."""
