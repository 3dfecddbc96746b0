"""Triton kernels of lora_ortho, installed as ``lora_ortho.triton_kernels``.

``mask_stream``, ``forward`` and ``backward`` hold the kernels and the launches that use them,
``tiles`` the steps that they share, ``launch_config`` how they are launched on which GPU, and
``resources`` what they take there, found by compiling without a GPU. The backend is
``lora_ortho.backends.triton``; docs/triton_kernels.md tells why things are as they are.
"""
