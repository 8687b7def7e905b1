"""`python -m modelworks.cli`, for where the script is not on the PATH."""

from modelworks.cli import main

main()
