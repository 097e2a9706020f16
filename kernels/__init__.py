"""One operation a file: the torch reference, a Triton kernel where it pays, and the function that chooses between them."""
