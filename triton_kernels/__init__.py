"""Triton kernels and their launchers, one file per family; installed as ``limpet.triton_kernels``."""
