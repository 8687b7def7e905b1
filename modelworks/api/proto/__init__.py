"""The .proto files for users, and their descriptors, which the server reads from descriptors.bin."""
