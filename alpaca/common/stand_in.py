"""Packages that are not imported while --help is printed.

To print the help of a verb its module is imported, and with it torch, which takes over a second. Of
torch, an import needs only names: for annotations, decorators, constants and base classes. So each
heavy package is replaced by an object that has every name and can be called.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

HEAVY = ("torch", "numpy", "httpx", "safetensors", "sentencepiece")  # over a second to import


class StandIn(ModuleType):
    """In the place of a heavy package, or of anything in it."""

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)

    def __call__(self, *args, **options) -> "StandIn":
        return self

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()

    __or__ = __ror__ = __call__


class StandInFinder:
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name.partition(".")[0] in HEAVY:
            return ModuleSpec(name, self, is_package=True)  # type: ignore

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def hide_heavy_packages() -> None:
    """For the rest of this process."""
    sys.meta_path.insert(0, StandInFinder())  # type: ignore
