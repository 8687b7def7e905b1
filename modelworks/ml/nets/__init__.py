"""Neural networks: one loop that trains them all, the families, and their way into an ONNX graph."""
