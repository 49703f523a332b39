"""Distillation losses: pure functions, masked, and normalised by the positions that count.

Each returns a sum over counted positions divided by `count`. Under gradient accumulation, or over several processes,
pass the count of the whole global batch: then the sum of the parts is the loss of one big batch, which a mean of means
is not where batches differ in length. Nothing is divided by the number of classes, nor by a padded length.
"""
