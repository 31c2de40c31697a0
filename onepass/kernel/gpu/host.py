"""Uniforms that follow only from hypers, computed on the host by the same code as the CPU's.

Two settings of a program with one pass, whose inputs are lr and 1 - lr * weight_decay:

    leaves = [[0.1, 0.2],  lr             fill(0, leaves) = [[0.1, 0.99],  the first setting
              [0.1, 0.1]]  weight_decay                      [0.2, 0.98]]  the second
"""

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
        texts: list[str] = []
        declared: set[str] = set()
        for pass_index, pass_ in enumerate(program.passes):
            function = Host(program, pass_, pass_index)
            texts.append(function.text())
            declared |= function.declared
        texts += sorted(declared)
        self._library = Library("\n".join(texts))
        pointer = ctypes.c_void_p
        signature = ctypes.CFUNCTYPE(None, pointer, ctypes.c_int64, pointer)
        self._functions = []
        for pass_index in range(len(program.passes)):
            address = self._library.address(f"host_{pass_index}")
            self._functions.append(signature(address))

    def fill(self, pass_index: int, leaves: np.ndarray) -> np.ndarray:
        """Return the inputs of a pass: (settings, inputs), in the compute type."""
        settings = leaves.shape[1]
        inputs = len(self.inputs[pass_index])
        table = np.empty((settings, inputs), self.dtype)
        function = self._functions[pass_index]
        function(leaves.ctypes.data, settings, table.ctypes.data)
        return table

    def fill_all(self, leaves: np.ndarray) -> np.ndarray:
        """Return the inputs of all passes, side by side: passes of 3 and 2 give (settings, 5)."""
        passes = range(len(self._functions))
        tables = [self.fill(pass_index, leaves) for pass_index in passes]
        return np.concatenate(tables, axis=1)

    def column(self, pass_index: int, node: Node, leaves: np.ndarray) -> np.ndarray:
        """Return one value of a pass, for each setting."""
        if node.op == "const":
            return np.full(leaves.shape[1], node.attr, self.dtype)
        table = self.fill(pass_index, leaves)
        return table[:, self.inputs[pass_index][node]]
