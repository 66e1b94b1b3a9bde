"""Settings of `conf/hardware` with which a trial's measurements take a moment: for tests that look at something else."""

MEASUREMENTS = [
    "hardware.prompt_tokens=8",
    "hardware.output_tokens=4",
    "hardware.warmup=1",
    "hardware.repeats=1",
    "hardware.seconds=0.1",
    "hardware.energy_tokens=8",
    # the machine is busy with other tests: what disturbs a measurement would decide how many trials there are
    "hardware.watch=false",
]
