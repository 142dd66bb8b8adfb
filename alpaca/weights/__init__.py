"""Weights, on disk and in memory. Read in this order:

loading       one function that opens a model, whatever it is made of
checkpoint    what a checkpoint is, read one tensor at a time; config_json its config
meta_format   Meta's releases seen as Hugging Face checkpoints
writer        a model written as a Hugging Face folder, one tensor in memory at a time
quantize      weights rounded to 8 and 4 bits; kernels lays them out for this machine
lora          low-rank adapters: the idea, their training, their files in adapter
bitdiff       the exact difference of two tensors, for weightdiff.py
convert, merge   the verbs `alpaca convert` and `alpaca merge`
"""
