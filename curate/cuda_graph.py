"""A network's launches on a GPU, recorded once and replayed: small kernels wait for no Python.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


class Captured:
    """A function of one CUDA tensor that is recorded for each shape and type it is called with.

    Parameters
    ----------
    function : callable
        Must run the same kernels for every tensor of a shape, and never wait for the device.
    """

    _WARM_UP = 3  # libraries choose kernels and take memory in their first runs

    def __init__(self, function: Function) -> None:
        self.function = function
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the function does, in memory of its own."""
        key = x.shape, x.dtype, x.stride(), x.device
        if key not in self._graphs:
            self._graphs[key] = self._record(x)
        graph, given, result = self._graphs[key]
        given.copy_(x)
        graph.replay()
        return result.clone()

    def _record(self, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        given = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(self._WARM_UP):
                self.function(given)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(given)
        return graph, given, result
