"""Weights, on disk and in memory. Read in this order:

loading.py            one function that opens a model, whatever it is made of
checkpoint.py         checkpoints, read one tensor at a time; their config in config_json.py
presets.py            the shapes of published models
meta_format.py        Meta's releases, read as Hugging Face checkpoints
gguf.py               llama.cpp's files, read the same way; gguf_writer.py writes them
writer.py             a Hugging Face folder, written one tensor at a time
quantized_linear.py   int8 and int4 layers: rounding, with its equations, and the kernels
int8_kernel.py        the one for a GPU, in Triton
quantize.py           a whole model of them: `alpaca quantize`
kernels.py            the layout that this machine decodes fastest
lora.py               LoRA: the idea, and a model to train
adapter.py            adapters in PEFT's files
reward.py             a reward model: one number instead of logits
convert.py, merge.py  `alpaca convert` and `alpaca merge`
bitdiff.py            the exact difference of two tensors, for weightdiff.py
"""
