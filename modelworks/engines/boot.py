"""What every child process begins with: `python -m modelworks.engines.boot MODULE`.

Imports make many objects and hardly any garbage, which looking for it all the while makes a quarter slower.
"""

import gc
import runpy
import sys

if __name__ == "__main__":
    gc.disable()  # until `attach`, or until whoever imports more after it says so
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
