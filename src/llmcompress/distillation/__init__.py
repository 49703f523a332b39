"""Distillation: a small student learns from the untouched original."""
