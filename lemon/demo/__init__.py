"""The demo: every stage on one slide."""
