"""Uniforms that follow only from hypers, computed on the host by the same code as the CPU's."""

from __future__ import annotations

import ctypes

import numpy as np

from ..graph.ir import Node
from ..graph.passes import Program
from ..llvm.native import Library
from ..llvm.uniforms import Host
from ..tensors.launching import NUMPY, input_index


class HostUniforms:
    """A program's uniforms as functions of its leaves (leaf, setting; float64)."""

    def __init__(self, program: Program) -> None:
        """Compile the functions `host_k` of all passes."""
        self.program = program
        self.dtype = NUMPY[program.compute]
        # Where each input stands among those of its pass.
        self.inputs = input_index(program)
        parts = [Host(program, pass_, k) for k, pass_ in enumerate(program.passes)]
        texts = [part.text() for part in parts]
        declared = {line for part in parts for line in part.declared}
        self._library = Library("\n".join([*texts, *sorted(declared)]))
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        addresses = [self._library.address(f"host_{k}") for k in range(len(parts))]
        self._functions = [signature(address) for address in addresses]

    def fill(self, pass_index: int, leaves: np.ndarray) -> np.ndarray:
        """Return the inputs of a pass: (settings, inputs), in the compute type."""
        settings = leaves.shape[1]
        table = np.empty((settings, len(self.inputs[pass_index])), self.dtype)
        self._functions[pass_index](leaves.ctypes.data, settings, table.ctypes.data)
        return table

    def fill_all(self, leaves: np.ndarray) -> np.ndarray:
        """Return the inputs of all passes, side by side: passes of 3 and 2 give (settings, 5)."""
        return np.concatenate([self.fill(k, leaves) for k in range(len(self._functions))], axis=1)

    def column(self, pass_index: int, node: Node, leaves: np.ndarray) -> np.ndarray:
        """Return one value of a pass, for each setting."""
        if node.op == "const":
            return np.full(leaves.shape[1], node.attr, self.dtype)
        return self.fill(pass_index, leaves)[:, self.inputs[pass_index][node]]
