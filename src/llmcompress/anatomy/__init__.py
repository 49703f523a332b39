"""What a model is made of: blocks, layers, ties, sizes; and the surgery on them."""
