"""What a peer of a data parallel training runs: `python -m modelworks.ml.nets.peer FD`, FD its end of a socket pair."""

import contextlib
import sys
from multiprocessing.connection import Connection

from modelworks.ml.nets.team import PeerLost, serve

if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError, PeerLost, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])))
