"""Evaluation: quality, latency, memory and size, measured."""
