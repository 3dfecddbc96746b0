"""Adapters in models: PEFT's layers served by the kernels, and adapters put into plain layers."""
