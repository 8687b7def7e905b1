"""Cleaning and transforms, declared as data; what ONNX can hold becomes graph, the rest travels as host transforms."""
