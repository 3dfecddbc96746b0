"""Triton kernels of lora_ortho, installed as ``lora_ortho.triton_kernels``.

``expand``, ``grad_s`` and ``grad_B`` hold a kernel and its launch each, ``backward`` what the two
of the gradients share, ``mask_stream`` the draws, ``tiles`` what is done with one tile and
``launch_config`` how the kernels are launched on which GPU. The backend is
``lora_ortho.backends.triton``; docs/triton_kernels.md tells why things are as they are.
"""
