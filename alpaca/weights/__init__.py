"""Weights on disk and in memory: HF and Meta files, integers of 8 and 4 bits, adapters."""
