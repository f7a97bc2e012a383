"""What runs below torch: formats that weights are stored in, and kernels that multiply with them."""
