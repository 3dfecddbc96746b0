"""Merges of LoRA factors inside other merging libraries; each module needs its library."""
