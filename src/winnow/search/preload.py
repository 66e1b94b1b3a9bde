"""Imports what every trial needs; the fork server imports this module once."""
# ruff: noqa: E402, I001  (the order matters)

import gc
import logging
import threading

gc.disable()  # imports leave little garbage, and collecting it takes a tenth of their time

import winnow.hardware.energy_preload  # runs in a thread until the end of this module
import winnow.model.import_transformers  # before everything that imports transformers
import tqdm
import winnow.benchmark.harness
import winnow.core.cli  # needed by the command, which is also the main module of children
import winnow.commands
import winnow.data.calibration
import winnow.model.load
import winnow.model.modeling_lowrank  # registers architectures that every load needs
import winnow.model.save
import winnow.search.early_stopping
import winnow.search.trial

# later imports (e.g. bitsandbytes) log hints about optional speed-ups at every start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# tqdm would create a semaphore in every child; children end without the cleanup that frees it
tqdm.tqdm.set_lock(threading.RLock())
winnow.hardware.energy_preload.wait()
gc.enable()
