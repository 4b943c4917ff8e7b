"""The Python face of csrc/: two fused ops, each beside its plain PyTorch twin."""

from train.ops.pack_embeddings import pack_embeddings, pack_embeddings_reference
from train.ops.ragged_conv1d import ragged_conv1d, ragged_conv1d_reference
from train.ops.row_exchange import RowExchange
from train.ops.segments import Segments

__all__ = [
    "RowExchange",
    "Segments",
    "pack_embeddings",
    "pack_embeddings_reference",
    "ragged_conv1d",
    "ragged_conv1d_reference",
]
