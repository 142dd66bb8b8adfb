"""From a prompt to an answer. Read in this order:

sampling.py       from logits to a token
prefix.py         sequences that share their beginning, or branch from one
engine.py         many sequences decoded together: continuous batching
cuda_graphs.py    the decoding step on a GPU, launched in one call
answer.py         a file of instructions, resumable
generate.py       `alpaca generate`: an instruction, or a file of them
chat.py           `alpaca chat`: a conversation
watermark.py      a watermark in sampled text, and its detector
"""
