"""Pure compute: data, training, evaluation, packages, runtimes. Knows no HTTP and no database."""
