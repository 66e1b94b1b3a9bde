"""What all tests share: the repository, its commands, a tiny model on disk, and the embedded one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest

from tests import started
from tests.logged import logged

REPOSITORY = Path(__file__).resolve().parents[1]


# in the background of a shell interrupts are ignored, and every search that a test starts and interrupts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # locks on devices lie in the temporary folder: workers must not wait for one another's measurements, nor share cores
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="winnow-tests-")
    Path(os.environ["TMPDIR"]).chmod(0o711)  # a database server runs as somebody else
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # after multiprocessing's own folder in it, whose priority is -100
    Finalize(None, shutil.rmtree, args=(os.environ["TMPDIR"], True), exitpriority=-200)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="every method on every shape of model, and slow tests")


# minutes each: were they begun last, one worker would wait for the other
LONGEST = ("test_readme.py", "test_search.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--all-shapes"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long: make test-all runs it"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python <script>.py <arguments>` as a user would; outputs go to the test's own folder."""

    def run(
        script: str, *arguments: str, outputs: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [f"{script}.py", *arguments]
        if not {"--help", "--cfg", "-c", "--info"} & set(arguments):
            words.append(f"outputs={outputs or tmp_path / 'outputs'}")
        return started.run(*words, **environment)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 80 thousand parameters and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.model.lm import LM
    from winnow.model.load import load_tokenizer
    from winnow.model.loading import Loading
    from winnow.model.save import save
    from winnow.nano.embedded import WEIGHTS

    tokenizer = load_tokenizer(str(WEIGHTS), Loading())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(LM(model=LlamaForCausalLM(config).to(torch.bfloat16), tokenizer=tokenizer, name="tiny"), folder)
    return folder


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """The lines that winnow logs during the test."""
    with logged() as lines:
        yield lines


@pytest.fixture
def run_in(tmp_path: Path) -> Any:
    """A `Run` whose folder is the test's own, with little calibration."""
    from winnow.core.types import Calibration
    from winnow.hardware.run import Run

    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", calibration=Calibration(samples=16, max_length=128))


@pytest.fixture(scope="session")
def nano_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF file in single precision, in a folder as `method=[gguf]` leaves it."""
    for library in ("llama_cpp", "gguf"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'winnow[gguf]'")
    from winnow.model.gguf.export import export
    from winnow.nano.embedded import trained

    folder = tmp_path_factory.mktemp("gguf") / "nano"
    folder.mkdir()
    lm = trained(dtype="float32")
    export(lm, folder / "model-F32.gguf", "F32")
    lm.model.config.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder
