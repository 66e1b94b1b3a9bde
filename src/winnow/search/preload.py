"""Imported once by the fork server: what every trial needs and would otherwise import itself."""

import winnow.benchmark.harness
import winnow.build
import winnow.hardware.meters
import winnow.hardware.preload
import winnow.model.load
import winnow.model.save  # noqa: F401
