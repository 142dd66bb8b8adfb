"""A Mac's GPU, simulated: it has no fp64, and its tensors do not mix with those of the CPU."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class FakeMps(TorchFunctionMode):
    """While it is entered, `device="mps"` makes tensors that lie in host memory, but answer and
    refuse as a Mac's do. Which they are is known by their storages."""

    def __init__(self):
        super().__init__()
        self.storages = {}  # kept, or an address could be taken again

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves, name = tree_leaves((args, kwargs or {})), getattr(func, "__name__", "")
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        ours = [self.has(each) for each in tensors]
        if name == "__get__" and func.__self__ in (Tensor.device, Tensor.is_mps) and ours[0]:
            return torch.device("mps") if func.__self__ is Tensor.device else True
        if name == "numpy" and ours[0]:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        named = [str(x) for x in leaves if isinstance(x, str | torch.device)]
        target = next((x for x in named if x in ("mps", "cpu", "meta")), None)
        target = "cpu" if name == "cpu" else target
        moves = name in ("to", "cpu") and target is not None
        sides = {self.has(each) for each in tensors if each.ndim}
        if len(sides) > 1 and not moves and name != "copy_":
            raise RuntimeError(f"{name}: tensors on two devices")
        args, kwargs = tree_map(
            lambda x: "cpu" if isinstance(x, str | torch.device) and str(x) == "mps" else x,
            (args, kwargs or {}),
        )
        out = func(*args, **kwargs)
        if moves and ours[0] != (target == "mps"):
            out = out.clone()
        if (target == "mps") if target else any(ours) and name not in ("copy_", "__set__"):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    if tensor.dtype == torch.float64:
                        raise TypeError("the MPS framework doesn't support float64")
                    storage = tensor.untyped_storage()
                    self.storages[storage._cdata] = storage
        return out
