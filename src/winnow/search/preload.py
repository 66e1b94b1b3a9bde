"""Imported once by the fork server: what every trial needs and would otherwise import itself."""

import logging
import threading

import tqdm
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import winnow.benchmark.harness
import winnow.commands
import winnow.hardware.preload
import winnow.model.load
import winnow.model.save  # noqa: F401

# what is imported after this (bitsandbytes, say) remarks on optional speed-ups at every start
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# tqdm would make a semaphore in every child; children end without the cleanup that gives it back
tqdm.tqdm.set_lock(threading.RLock())
