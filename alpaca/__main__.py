"""`alpaca VERB`: every command except the three at the root. A verb's module is loaded when run."""

import difflib
import importlib
import signal
import sys

from alpaca.common.errors import notice, run_command
from alpaca.common.stand_in import hide_heavy_packages

VERBS = {  # in order, from data to a published model
    "train-tokenizer": ("alpaca.datagen.train_tokenizer", "train a tokenizer.model on text files"),
    "curate": ("alpaca.datagen.curate", "inspect and clean instruction data"),
    "decontaminate": ("alpaca.capability.decontaminate", "find evaluation sets in training data"),
    "plot": ("alpaca.training.plot", "plot the losses of training runs"),
    "convert": ("alpaca.weights.convert", "write a checkpoint as a Hugging Face folder"),
    "quantize": ("alpaca.weights.quantize", "round weights to 8 or 4 bits"),
    "merge": ("alpaca.weights.merge", "write a base model and its adapter as one model"),
    "generate": ("alpaca.inference.generate", "answer an instruction"),
    "chat": ("alpaca.inference.chat", "hold a conversation with a model"),
    "serve": ("alpaca.serving.serve", "a web page and OpenAI's API for one model"),
    "watermark": ("alpaca.inference.watermark", "detect the watermark in a text"),
    "answers": ("alpaca.evaluation.answers", "answer an evaluation set with a model"),
    "blind": ("alpaca.evaluation.blind", "let people compare two models' answers blindly"),
    "judge": ("alpaca.evaluation.judge", "let a model compare two models' answers"),
    "samples": ("alpaca.evaluation.samples", "draw several answers to each instruction"),
    "best-of": ("alpaca.evaluation.best_of", "pick the best of several answers by a reward"),
    "score": ("alpaca.evaluation.score", "win rates from annotation files"),
    "benchmark": ("alpaca.capability.benchmark", "accuracies on published benchmarks"),
    "compare": ("alpaca.capability.compare", "style beside capability: a page from all results"),
}

USAGE = """usage: alpaca VERB ...      (alpaca VERB --help explains one)

{verbs}

Beside these: torchrun fsdp_train.py, python selfinstruct.py, python weightdiff.py, run in the
checkout."""


def load_verb(verb: str):
    """A verb's module and its parser."""
    from alpaca.common.cli import Parser

    module = importlib.import_module(VERBS[verb][0])
    parser = Parser(prog=f"alpaca {verb}", description=module.__doc__)
    module.add_arguments(parser)
    return module, parser


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:16} {VERBS[name][1]}" for name in VERBS)
        return run_command(lambda: print(USAGE.format(verbs=verbs)))
    if verb not in VERBS:
        similar = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"one of {', '.join(VERBS)}"
        notice(f"error: unknown verb {verb[:40]!r}: {hint}")
        sys.exit(2)
    if sys.argv[-1] in ("-h", "--help") and "--" not in sys.argv and "torch" not in sys.modules:
        hide_heavy_packages()  # whatever is parsed, the process ends
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in an import just ends it
    module, parser = load_verb(verb)
    signal.signal(signal.SIGINT, handler)
    arguments, sys.argv = sys.argv[2:], [f"alpaca {verb}"]  # the name that errors begin with
    run_command(lambda: module.run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.argv[0] = "alpaca"
    main()
