"""Pruning: weights or whole structures that go."""
