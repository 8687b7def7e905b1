"""What an embedding or a rerank model is asked for: one definition of their signatures for the edges and the runtimes.

Calls of different clients run together, so everything about a text is a column of its row.
"""

from __future__ import annotations

from modelworks.core.types import Signature, TensorSpec

EMBEDDING = "embedding"
RERANK = "rerank"

_TOKENS = TensorSpec(name="tokens", datatype="INT32", shape=[-1])  # tokens of the row that the model read
_TRUNCATE = TensorSpec(name="truncate", datatype="BOOL", shape=[-1], optional=True)


def embedding_signature(dimensions: int) -> Signature:
    """`text`, or where `token_ids` are given, those: rows padded with -1; the text of such a row is not looked at.

    A row with more tokens than the model takes is refused, or with `truncate` cut. `embedding` has unit length when the
    model says so.
    """
    return Signature(
        inputs=[
            TensorSpec(name="text", datatype="BYTES", shape=[-1]),
            TensorSpec(name="token_ids", datatype="INT32", shape=[-1, -1], optional=True),
            _TRUNCATE,
        ],
        outputs=[TensorSpec(name="embedding", datatype="FP32", shape=[-1, dimensions]), _TOKENS],
    )


# a cross-encoder: one row a document; `score` is between 0 and 1, higher is more relevant
RERANK_SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="query", datatype="BYTES", shape=[-1]),
        TensorSpec(name="document", datatype="BYTES", shape=[-1]),
        _TRUNCATE,
    ],
    outputs=[TensorSpec(name="score", datatype="FP32", shape=[-1]), _TOKENS],
)
