"""Encoders: vision transformers for single nuclei, the released LEMON checkpoint, and export in timm's layout."""
