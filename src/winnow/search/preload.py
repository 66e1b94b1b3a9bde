"""Imported once by the fork server: what every trial needs and would otherwise import itself."""

import gc
import logging
import threading

import tqdm
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import winnow.benchmark.harness
import winnow.cli  # the command, which is the main module of children, too
import winnow.commands
import winnow.hardware.preload
import winnow.model.load
import winnow.model.save
import winnow.search.gates
import winnow.search.trial  # noqa: F401

# what is imported after this (bitsandbytes, say) remarks on optional speed-ups at every start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# tqdm would make a semaphore in every child; children end without the cleanup that gives it back
tqdm.tqdm.set_lock(threading.RLock())
# a child's garbage collector leaves these objects alone: to look at them would copy their pages
gc.collect()
gc.freeze()
