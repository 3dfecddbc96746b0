"""Triton kernels of lora_ortho, installed as ``lora_ortho.triton_kernels``.

This package holds no kernels yet: ``lora_ortho.backends.available()`` says so for ``"triton"``.
"""
