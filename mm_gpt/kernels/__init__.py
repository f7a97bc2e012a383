"""What runs below torch: storage formats of weights, and the kernels that multiply with them."""
