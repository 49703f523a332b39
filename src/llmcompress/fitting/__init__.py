"""Find the chain of steps that brings a model within a size or a time at the least loss."""
