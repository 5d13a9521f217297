"""The table of weight formats: how a matrix can be held in memory. The layouts are in `csrc/cpu/formats/formats.hpp`.

Names are those of GGUF's types in lower case, and a format holds the bits of a tensor of its type. Columns of a row
form groups of 32 (in q6_k, q3_k and q2_k of 16) that share a scale, and in some formats a minimum. This module imports
neither NumPy nor native code.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32  # columns that share a scale of activations
PANEL = 16  # output rows that are packed together


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held in memory.

    Attributes:
        name: what recipes and pack files call it.
        bits: of a stored number.
        scale_bits: what scales and minima add to a weight, in bits; 0: not quantised.
        quantises: weights of other types can be packed in it; else only blocks of its own.
    """

    name: str
    bits: int
    scale_bits: float = 0
    quantises: bool = True

    @property
    def element(self) -> str:
        """The type of tensor elements whose bits it holds."""
        return self.name.upper()

    @property
    def quantised(self) -> bool:
        return self.scale_bits != 0

    @property
    def bits_per_weight(self) -> float:
        """Memory of a weight, but for padding: what a pass reads."""
        return self.bits + self.scale_bits

    @property
    def block(self) -> int:
        """Columns that packed matrices are padded to a multiple of."""
        return 2 * GROUP if self.quantised else GROUP


# From the most precise to the smallest.
FORMATS = {
    f.name: f
    for f in (
        WeightFormat("f32", bits=32),
        WeightFormat("f16", bits=16),
        WeightFormat("bf16", bits=16),
        WeightFormat("q8_0", bits=8, scale_bits=0.5),
        WeightFormat("q6_k", bits=6, scale_bits=0.625),
        WeightFormat("q5_1", bits=5, scale_bits=1),
        WeightFormat("q5_k", bits=5, scale_bits=0.625),
        WeightFormat("q5_0", bits=5, scale_bits=0.5),
        WeightFormat("q4_1", bits=4, scale_bits=1),
        WeightFormat("q4_k", bits=4, scale_bits=0.625),
        WeightFormat("q4_0", bits=4, scale_bits=0.5),
        WeightFormat("iq4_nl", bits=4, scale_bits=0.5),
        WeightFormat("iq4_xs", bits=4, scale_bits=0.5),
        WeightFormat("mxfp4", bits=4, scale_bits=0.5, quantises=False),
        WeightFormat("q3_k", bits=3, scale_bits=0.625, quantises=False),
        WeightFormat("q2_k", bits=2, scale_bits=1.125, quantises=False),
    )
}


def native_format(element: str) -> str:
    """The format that holds the bits of tensors of an element type, such as "Q4_K".

    Raises:
        ValueError: there is none.
    """
    fmt = element.lower()
    if fmt not in FORMATS or element != element.upper():
        raise ValueError(f"no weight format holds tensors of type {element}")
    return fmt
