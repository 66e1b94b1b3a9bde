"""The table of every strategy: what each makes of the embedded model, found by the search itself, and what that cost.

    python bench/table.py run     # hours; started again, it goes on where it was
    python bench/table.py pack    # writes bench/table/*.parquet from the study

`search.py agent=grid` evaluates the space below exhaustively: every trial is compressed, saved, loaded back, measured and
scored on all items. Packed are all figures, what each part took in seconds, and every item's outcome; `search_efficiency.py`
replays searches on these.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import REPOSITORY

FOLDER = Path(__file__).with_name("table")
STUDY = "table"
SPACE = [
    "method=[wanda,magnitude,depth,width,lora,rtn,gptq,nf4,int8,gguf]",
    "method.wanda.pattern=unstructured",
    "method.wanda.allocation=uniform",
    "method.wanda.sparsity=choice(0.3,0.5,0.6,0.7)",
    "method.magnitude.pattern=unstructured",
    "method.magnitude.allocation=uniform",
    "method.magnitude.sparsity=choice(0.3,0.5)",
    "method.depth.share=choice(0.2,0.4)",
    "method.depth.by=influence",
    "method.width.mlp=choice(0.5,0.75)",
    "method.width.heads=1.0",
    "method.width.hidden=1.0",
    "method.lora.rank=32",
    "method.lora.learning_rate=0.003",
    "method.lora.steps=100",
    "method.rtn.group_size=choice(32,128)",
    "method.gptq.bits=choice(2,3,4)",
    "method.gptq.group_size=choice(32,128)",
    "method.gguf.type=choice(Q8_0,Q4_K_M,Q3_K_M,Q2_K)",
    "method.gguf.imatrix=true",
]


def run(arguments: list[str]) -> None:
    """The whole space, in order: what begins alike comes one after the other, and its beginning is made once."""
    settings = [
        "agent=grid", f"study={STUDY}", "budget.trials=100000", "convergence=null", "first_slots=[]", "keep=none",
        "racing.error_rate=0", "racing.hopeless_ratio=0", "wandb.mode=disabled",
    ]  # fmt: skip
    line = [sys.executable, str(REPOSITORY / "search.py"), *settings, *SPACE, *arguments]
    sys.exit(subprocess.run(line, cwd=REPOSITORY, check=False).returncode)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2:])
    else:
        sys.exit(__doc__)
