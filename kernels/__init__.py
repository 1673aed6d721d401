"""Integer kernels: the network, its NumPy definition, and the engines that run it bit for bit."""
