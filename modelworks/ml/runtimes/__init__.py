"""What runs a package. Runtimes never import each other."""
