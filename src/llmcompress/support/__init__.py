"""The support matrix: every architecture of the installed transformers, tiny, under every structural strategy."""
