"""Sweeps: a study's points x seeds, each a trial of ``lemon.experiment``; Ray Tune runs them."""
