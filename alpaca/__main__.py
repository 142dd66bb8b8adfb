"""`alpaca VERB`: every command but the three at the root, each loaded when it runs."""

import importlib
import sys

from alpaca.common.errors import notice, run_command

VERBS = {  # in the order of the road; those whose module has several verbs get theirs as a word
    "train-tokenizer": ("alpaca.datagen.train_tokenizer", "make a tokenizer.model from text files"),
    "curate": ("alpaca.datagen.curate", "look at instruction data and clean it"),
    "convert": ("alpaca.weights.checkpoint", "write a checkpoint as a Hugging Face folder"),
    "quantize": ("alpaca.weights.quantize", "weights of 8 or 4 bits"),
    "merge": ("alpaca.weights.lora", "write base and adapter as one model"),
    "generate": (
        "alpaca.inference.generate",
        "ask a model: an instruction, a file, a conversation",
    ),
    "serve": ("alpaca.serving.app", "a web page and OpenAI's API over one model"),
    "watermark": ("alpaca.inference.watermark", "is a text watermarked?"),
    "answers": ("alpaca.evaluation.evaluate", "run a model over a set of instructions"),
    "blind": ("alpaca.evaluation.evaluate", "people compare two models' answers"),
    "judge": ("alpaca.evaluation.evaluate", "a model compares two models' answers"),
    "score": ("alpaca.evaluation.evaluate", "win rates of annotation files"),
}
SHARED = {"convert", "merge", "answers", "blind", "judge", "score"}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(
            "usage: alpaca VERB ...\n\n" + "\n".join(f"  {v:16} {h}" for v, (_, h) in VERBS.items())
        )
        return
    if verb not in VERBS:
        notice(f"error: no verb {verb!r}: one of {', '.join(VERBS)}")
        sys.exit(2)
    module = importlib.import_module(VERBS[verb][0])
    sys.argv = ["alpaca", *sys.argv[1:]] if verb in SHARED else [f"alpaca {verb}", *sys.argv[2:]]
    run_command(module.main)


if __name__ == "__main__":
    sys.argv[0] = "alpaca"
    main()
