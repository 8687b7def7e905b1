"""The command line: thin over the SDK. Nothing heavy is imported until a command runs."""

from __future__ import annotations


def main() -> None:
    """The entry point of the `modelworks` script."""
    import gc

    gc.disable()  # imports make many objects and no garbage
    from modelworks.cli.app import app

    gc.enable()
    app(prog_name="modelworks")
