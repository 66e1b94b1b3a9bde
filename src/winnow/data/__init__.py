"""Documents to calibrate and train on, and the tasks of benchmarks as files or from the hub."""
