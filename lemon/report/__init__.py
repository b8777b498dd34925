"""Stage 7: pictures and tables for people, from what the other stages left on disk."""
