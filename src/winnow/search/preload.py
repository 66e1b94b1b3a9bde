"""Imported once by the fork server: what every trial needs and would otherwise import itself."""
# ruff: noqa: F401

import logging
import threading

import tqdm
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import winnow.benchmark.harness
import winnow.cli  # the command, which is the main module of children, too
import winnow.commands
import winnow.hardware.preload
import winnow.model.calibration
import winnow.model.load
import winnow.model.modeling_lowrank  # architectures that every loading makes known
import winnow.model.save
import winnow.search.gates
import winnow.search.trial

# what is imported after this (bitsandbytes, say) remarks on optional speed-ups at every start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# tqdm would make a semaphore in every child; children end without the cleanup that gives it back
tqdm.tqdm.set_lock(threading.RLock())
