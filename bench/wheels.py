"""Packages that are measured, not used: installed into folders of their own below .tools, once."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".tools" / "bench"


def install(folder: Path, *requirements: str, dependencies: bool = True) -> None:
    """Put packages, with `dependencies` all that they need, into `folder`, unless they are there."""
    done = folder / ".whole"
    wanted = "\n".join(requirements)
    if done.exists() and done.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--only-binary",
        ":all:",
        "--upgrade",
        "--target",
        str(folder),
    ]
    alone = [] if dependencies else ["--no-deps"]
    result = subprocess.run([*command, *alone, *requirements], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"bench: pip cannot install {', '.join(requirements)}: {result.stderr.strip()[-500:]}")
    done.write_text(wanted)
