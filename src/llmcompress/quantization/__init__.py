"""Quantization: fewer bits a weight."""
