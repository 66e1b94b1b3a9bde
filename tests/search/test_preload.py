"""The fork server's imports: what they leave behind, and what they leave out."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY

# Python reports every connection and every question for an address, whoever makes it.
LOOK = """
import gc, importlib.util, json, os, sys, threading
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
import winnow.search.preload
from transformers import cache_utils
from winnow.hardware.energy import detect
print(json.dumps({
    "asked": asked,
    "imported": [x for x in ("sklearn", "scipy", "boto3", "torch._inductor.lowering") if x in sys.modules],
    "found": [x for x in ("sklearn", "scipy", "boto3") if importlib.util.find_spec(x)],
    "quantizer": hasattr(cache_utils, "HQQQuantizer"),
    "compiler": os.environ.get("TORCHDYNAMO_DISABLE"),
    "collects": gc.isenabled(),
    "threads": threading.active_count(),
    "detected": detect.cache_info().currsize,
}))
"""


def printed(code: str, **environment: str) -> Any:
    """What a new Python prints as its last line, as JSON."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]), **environment}
    env = {name: value for name, value in env.items() if value}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_server_imports_what_trials_need_and_leaves_the_process_as_it_was() -> None:
    seen = printed(LOOK, TORCHDYNAMO_DISABLE="")
    assert seen["asked"] == []  # a name server that does not answer would hold up every search
    assert seen["imported"] == []
    assert seen["found"] == [x for x in ("sklearn", "scipy", "boto3") if importlib.util.find_spec(x)]
    assert seen["quantizer"] == (importlib.util.find_spec("hqq") is not None)
    assert seen["compiler"] is None
    assert seen["collects"]
    assert seen["threads"] == 1  # a fork takes one thread along, and the locks of all
    assert seen["detected"] == (importlib.util.find_spec("codecarbon") is not None)


def test_transformers_may_have_been_asked_for_a_package_before() -> None:
    """It keeps its answers, and would import what it found then."""
    pytest.importorskip("sklearn")
    code = """
import json
from transformers.utils import import_utils
asked = import_utils.is_sklearn_available() and import_utils.is_scipy_available()
import winnow.model.import_transformers
from transformers.generation import candidate_generator
from transformers.loss import loss_for_object_detection
print(json.dumps([asked, hasattr(candidate_generator, "roc_curve"), hasattr(loss_for_object_detection, "linear_sum_assignment")]))
"""
    assert printed(code) == [True, True, True]
