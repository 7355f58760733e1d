"""Kernels of the fused runner: Triton for every shape and dtype, CUDA for the few tokens of decoding."""
