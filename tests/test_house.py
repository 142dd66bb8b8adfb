"""The house of CONTRIBUTING.md: which module may import which, and names that mean one thing."""

import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from helpers.commands import FILES, ROOT

COMMANDS = {"fsdp_train", "selfinstruct", "weightdiff"}
CORE = {"model", "tokenizer", "templates", "bpe", "dataset", "rougel"}
MAY_IMPORT = {  # chapter → chapters below it; every chapter may import the core
    "common": set(),
    "weights": {"common"},
    "inference": {"common", "weights"},
    "training": {"common", "weights", "inference", "datagen"},
    "datagen": {"common"},
    "evaluation": {"common", "weights", "inference", "datagen"},
    "serving": {"common", "weights", "inference", "datagen"},
    "capability": {"common", "weights", "inference", "datagen", "evaluation"},
}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}


def imports(name: str) -> set[str]:
    """Modules of this project that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(FILES)


def chapter(name: str) -> str:
    return name.split(".")[1] if name.startswith("alpaca.") else name


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_arrows(name):
    for other in imports(name):
        if name in COMMANDS or name in ("alpaca", "alpaca.__main__"):
            continue
        assert other not in COMMANDS, f"{name} imports the command {other}"
        if name == "model":
            raise AssertionError(f"model.py imports {other}, and it may import torch only")
        if name in CORE:
            assert other in CORE or chapter(other) == "common", f"{name} imports {other}"
        elif other not in CORE and other != "alpaca":
            below = MAY_IMPORT[chapter(name)] | {chapter(name)}
            assert chapter(other) in below, f"{name} imports {other}"


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            path.append(name)
            for other in sorted(imports(name)):
                visit(other)
            path.pop()
            done.add(name)

    for name in FILES:
        visit(name)


def test_the_root_has_few_files_and_no_long_ones():
    assert len([name for name in FILES if "." not in name and name != "alpaca"]) <= 9
    lengths = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert not {name: n for name, n in lengths.items() if n > 450}


def test_a_module_level_name_means_one_thing():
    """Only `main`, `add_arguments` and `run` are defined in more than one module."""
    where = defaultdict(set)
    for name, tree in TREES.items():
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            for defined in [node.name] if hasattr(node, "name") else names:
                where[defined].add(name)
    allowed = {"main", "add_arguments", "run"}
    assert not {n: m for n, m in where.items() if len(m) > 1 and n not in allowed}


def test_modules_import_without_a_command_line_or_a_compiler():
    """torch's compiler would cost two seconds at every start without a GPU. `alpaca generate` needs
    no part of torch, and no other big package, that `import torch` has not loaded."""
    when_needed = {"alpaca.weights.int8_kernel"}
    names = ", ".join(FILES.keys() - when_needed)
    compiler = "torch.cuda.is_available() or 'torch._dynamo' not in sys.modules"
    load = "alpaca.weights.loading.load_model('data/tiny-llama')"
    code = "import sys, torch; known = {*sys.modules}; import alpaca.inference.generate; "
    code += "tops = {name.partition('.')[0] for name in {*sys.modules} - known}; "
    code += "assert not tops & {'torch', 'numpy', 'sympy', 'httpx', 'asyncio', 'transformers'}; "
    code += f"import {names}; {load}; assert {compiler}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_reading_records_does_not_load_torch():
    code = "import sys, selfinstruct, alpaca.datagen.curate, alpaca.evaluation.win_rate; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_pickle_is_read_but_as_plain_tensors():
    """Unpickling runs code. `torch.load(weights_only=True)` does not; its error is a pickle's."""
    words = r"pickle\.\w+|from pickle|distributed\.checkpoint|\b(?:dill|joblib|marshal|shelve)\b"
    for name, file in FILES.items():
        text = file.read_text()
        assert set(re.findall(words, text)) <= {"pickle.UnpicklingError"}, name
        calls = re.findall(r"torch\.load.*", text)
        assert all("weights_only=True)" in call for call in calls), name
