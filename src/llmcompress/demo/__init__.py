"""The demo that needs no network: a teacher fine-tuned on docstrings, three compressed versions, and their report."""
