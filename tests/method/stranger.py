"""A process of its own that knows transformers and not winnow: prints what a stranger's program computes with an artifact.

Reads paths from standard input, one a line; answers each with the path of a safetensors file of logits, or an error.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

warnings.simplefilter("ignore")
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
logging.disable(logging.WARNING)


def answer(path: str, output: str, text: str) -> None:
    own_code = "auto_map" in json.loads(Path(path, "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=own_code).eval()
    if Path(path, "adapter").is_dir():
        model = PeftModel.from_pretrained(model, path + "/adapter").eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a faster kernel that rounds differently: not what is tested
            module.support_avx512bf16_for_cpu = False
    ids = AutoTokenizer.from_pretrained(path, trust_remote_code=own_code)([text], return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(input_ids=ids).logits.float()
    save_file({"logits": logits}, output)


for line in sys.stdin:
    request = json.loads(line)
    try:
        answer(**request)
        print("ok", flush=True)
    except Exception as error:  # said to the test, which fails with it
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
