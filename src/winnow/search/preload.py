"""Imported once by the fork server: what every trial needs and would otherwise import itself."""
# ruff: noqa: E402, I001  (the order matters)

import gc
import logging
import threading

gc.disable()  # imports leave little garbage, and the search for it takes a tenth of their time

import winnow.hardware.energy_preload  # goes on in a thread until the end of this module
import winnow.model.import_transformers  # before all that imports transformers
import tqdm
import winnow.benchmark.harness
import winnow.core.cli  # the command, which is the main module of children, too
import winnow.commands
import winnow.data.calibration
import winnow.model.load
import winnow.model.modeling_lowrank  # architectures that every loading makes known
import winnow.model.save
import winnow.search.early_stopping
import winnow.search.trial

# what is imported after this (bitsandbytes, say) remarks on optional speed-ups at every start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# tqdm would make a semaphore in every child; children end without the cleanup that gives it back
tqdm.tqdm.set_lock(threading.RLock())
winnow.hardware.energy_preload.wait()
gc.enable()
