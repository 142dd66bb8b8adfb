"""What every command shares. Read in this order:

    errors           a user's error is one line and exit code 2; a bug keeps its traceback
    files            files that are complete or absent, logs that survive a kill, locked run folders
    system           what differs between operating systems: locks, memory, open files
    cli              argparse with one-line errors that name the flag that was meant
    tokenizer_json   byte-level BPE as Hugging Face stores it
    progress         one line: done/total, rate, time left
    charts           pictures as SVG text
    gguf_file        llama.cpp's files, their frame and metadata
    jinja            chat templates as the programs that models come with
    sentencepiece_file, gguf_bpe   the tokenizer in such a file, of either kind

Root modules import this chapter and no other.
"""
