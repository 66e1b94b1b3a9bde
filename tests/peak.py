"""The peak main memory of a `compress.py` run, as the kernel saw it and as it was forecast; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURE = """
import re, runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak.group(1)) * 1024)
"""
FORECAST = """
import sys
from hydra import compose, initialize_config_dir
from winnow.core.cli import CONF
from winnow.build.command_settings import dry_run
from winnow.report.dry_run import forecast
with initialize_config_dir(str(CONF), version_base="1.3"):
    cfg = compose("compress", sys.argv[1:])
print(forecast(dry_run(cfg))[1].host_peak_bytes)
"""


def measured_peak(*arguments: str, outputs: Path) -> int:
    """Bytes: the largest resident set (VmHWM of Linux) of `python compress.py <arguments>`, its libraries included."""
    return _last_number(MEASURE, str(REPOSITORY / "compress.py"), *arguments, f"outputs={outputs}")


def predicted_peak(*arguments: str) -> int:
    """Bytes: what `compress.py <arguments> dry_run=true` says of the same run."""
    return _last_number(FORECAST, *arguments)


def _last_number(code: str, *arguments: str) -> int:
    line = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])
