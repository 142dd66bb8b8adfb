"""CUDA graphs of the decoding step: all of its kernels launched in one call.

A decoding step for a few sequences is hundreds of small kernels, and launching them one by one from
Python takes longer than running them. A CUDA graph records the launches once and replays them.

A recorded graph always runs the same kernels on the same memory, so

  - there is one graph for each batch size 1, 2, 4 …, and a batch is filled up to the next of these;
  - ids are copied into the tensor that the graph reads, and the logits are read from the tensor
    that it writes, before the next replay.

Recording runs the step. That is harmless while all slots of the cache are empty, since an empty
slot stays empty whatever is computed for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # runs before the recording, in which kernels are compiled and chosen


class CudaGraphs:
    """`step(ids)` maps ids (B) to logits (B, V), for every B in `sizes`."""

    def __init__(self, step: Callable[[Tensor], Tensor], sizes: list[int], device: torch.device):
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        pool = None
        with torch.inference_mode():
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                ids = torch.zeros(size, dtype=torch.int64, device=device)
                side_stream = torch.cuda.Stream()
                side_stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side_stream):
                    for _ in range(WARM_UP):
                        step(ids)
                torch.cuda.current_stream().wait_stream(side_stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = step(ids)
                pool = graph.pool()
                self.graphs[size] = graph, ids, logits

    def replay(self, ids: Tensor) -> Tensor:
        """Logits (B, V), valid until the next replay."""
        graph, graph_ids, logits = self.graphs[len(ids)]
        graph_ids.copy_(ids)
        graph.replay()
        return logits
