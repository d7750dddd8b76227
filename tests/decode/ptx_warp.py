"""Runs the few instructions of PTX that the kernels have as inline assembly, for a warp of 32 threads, in NumPy.

What a GPU does with matrix fragments is written out from the PTX manual (mma.m16n8k16): it is what the kernels' own
reckoning of threads, outputs, inputs and columns is held against.
"""

import re

import numpy as np


LANES = np.arange(32)


class Warp:
    """Registers (32,) uint32 by name; shared memory in words. operands: `$0`, `$1` and so on."""

    def __init__(self, operands: dict[int, np.ndarray], shared: np.ndarray):
        self.registers = {f"${i}": np.broadcast_to(value, 32).astype(np.uint32) for i, value in operands.items()}
        self.shared = shared

    def value(self, name: str) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        return np.full(32, int(name[2:], 16) if name.startswith("0f") else int(name, 0), np.uint32)

    def run(self, text: str) -> None:
        for line in re.sub(r"//.*", "", text).strip().strip("{}").replace("\n", " ").split(";"):
            opcode, _, given = line.strip().partition(" ")
            if opcode and opcode != ".reg":
                vectors = [[name.strip() for name in each.split(",")] for each in re.findall(r"\{([^}]*)\}", given)]
                plain = [name.strip(" []") for name in re.sub(r"\{[^}]*\}", "", given).split(",")]
                getattr(self, opcode.split(".")[0])(opcode, [name for name in plain if name], vectors)

    def mov(self, opcode, names, vectors):
        self.registers[names[0]] = self.value(names[1])

    def add(self, opcode, names, vectors):
        first, second = self.value(names[1]), self.value(names[2])
        if opcode == "add.f32":
            self.registers[names[0]] = (first.view(np.float32) + second.view(np.float32)).view(np.uint32)
        else:
            self.registers[names[0]] = first + second

    def xor(self, opcode, names, vectors):
        self.registers[names[0]] = self.value(names[1]) ^ self.value(names[2])

    def shl(self, opcode, names, vectors):
        self.registers[names[0]] = self.value(names[1]) << self.value(names[2])

    def mad(self, opcode, names, vectors):
        self.registers[names[0]] = self.value(names[1]) * self.value(names[2]) + self.value(names[3])

    def prmt(self, opcode, names, vectors):
        first, second, selector = (self.value(name) for name in names[1:])
        found = np.zeros(32, np.uint32)
        for i in range(4):
            which = (selector >> np.uint32(4 * i)) & np.uint32(7)
            word = np.where(which < 4, first, second)
            found |= ((word >> (8 * (which % 4))) & np.uint32(255)) << np.uint32(8 * i)
        self.registers[names[0]] = found

    def _shared(self, opcode, names, vectors):
        """Where each thread's words lie. One access of a warp must not wait for a bank."""
        words = 4 if ".v4" in opcode else 1
        places = self.value(names[-1] if opcode.startswith("ld") else names[0]).astype(int) // 4
        for group in np.split(places, words):
            banks = (group[:, None] + np.arange(words)) % 32
            assert len(np.unique(banks)) == 32, "two threads meet in a bank"
        return places

    def ld(self, opcode, names, vectors):
        self.registers[names[0]] = self.shared[self._shared(opcode, names, vectors)]

    def st(self, opcode, names, vectors):
        places = self._shared(opcode, names, vectors)
        for i, name in enumerate(vectors[0]):
            self.shared[places + i] = self.value(name)

    def _and(self, opcode, names, vectors):
        self.registers[names[0]] = self.value(names[1]) & self.value(names[2])

    def mma(self, opcode, names, vectors):
        assert opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        d, a, b, c = vectors
        left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8), np.float32)
        row, quarter = LANES // 4, LANES % 4
        for i, name in enumerate(a):
            for j, number in enumerate(halves(self.value(name))):
                left[row + 8 * (i % 2), 2 * quarter + j + 8 * (i // 2)] = number
        for i, name in enumerate(b):
            for j, number in enumerate(halves(self.value(name))):
                right[2 * quarter + j + 8 * i, row] = number
        for i, name in enumerate(c):
            sums[row + 8 * (i // 2), 2 * quarter + i % 2] = self.value(name).view(np.float32)
        sums = (sums + left @ right).astype(np.float32)
        for i, name in enumerate(d):
            self.registers[name] = sums[row + 8 * (i // 2), 2 * quarter + i % 2].view(np.uint32)


setattr(Warp, "and", Warp._and)


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 of the two numbers of bfloat16 in each word."""
    return (words << np.uint32(16)).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)
