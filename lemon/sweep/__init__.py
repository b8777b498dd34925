"""Sweeps: a study's points x seeds, each a trial of ``lemon.sweep.trial``; Ray Tune runs them."""
