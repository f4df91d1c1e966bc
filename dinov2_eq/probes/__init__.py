"""Algorithms that measure frozen features; they work on tensors, without files and config."""
