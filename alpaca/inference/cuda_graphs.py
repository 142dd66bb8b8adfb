"""CUDA graphs of the decoding step: all of its kernels launched in one call.

A decoding step for a few sequences is hundreds of small kernels, and launching them one by one from
Python takes longer than running them. A CUDA graph records the launches once and replays them.

A recorded graph always runs the same kernels on the same memory, so

  - there is one graph for each batch size 1, 2, 4 … and each reach 256, 512 …, the positions of the
    cache that attention reads: a step takes the next size and reach that are large enough;
  - ids are copied into the tensor that the graph reads, and the logits are read from the tensor
    that it writes, before the next replay.

A graph is recorded when it is first needed. Recording runs the step, which stores keys and values
behind each sequence's last; with the lengths restored, the replay that follows replaces them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # runs before the recording, in which kernels are compiled and chosen


class CudaGraphs:
    """`step(ids, reach)` maps ids (B) to logits (B, V), and adds 1 to the cache's `lengths`."""

    def __init__(self, step: Callable[[Tensor, int], Tensor], lengths: Tensor):
        self.step, self.lengths, self.pool = step, lengths, None
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def record(self, ids: Tensor, reach: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        lengths = self.lengths.clone()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self.step(ids, reach)
                self.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):  # one at a time runs: they share memory
            logits = self.step(ids, reach)
        self.pool = graph.pool()
        return graph, ids, logits

    def replay(self, ids: Tensor, reach: int) -> Tensor:
        """Logits (B, V), valid until the next replay."""
        if (key := (len(ids), reach)) not in self.graphs:
            self.graphs[key] = self.record(ids, reach)
        graph, graph_ids, logits = self.graphs[key]
        graph_ids.copy_(ids)
        graph.replay()
        return logits
