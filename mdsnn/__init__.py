"""Quantized spiking neural networks from PyTorch to hardware, bit for bit.

This package imports nothing by itself, so that `mdsnn.kernels` and `mdsnn.hwsim` work where torch is missing.
Start with `mdsnn.train`, `mdsnn.layers`, `mdsnn.models`, `mdsnn.export`, `mdsnn.kernels` and `mdsnn.hwsim`.
"""
