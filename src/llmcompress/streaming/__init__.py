"""Compression of models that are bigger than memory: weights come from disk block after block, and go back there."""
