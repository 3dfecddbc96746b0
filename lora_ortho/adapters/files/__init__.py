"""Adapters on disk: the layouts that are read, each checked whole, and the bytes of an export."""
