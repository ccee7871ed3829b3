"""What the network is built of, and the kernels below it."""
