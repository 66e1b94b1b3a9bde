"""The embedded model and the small world that its benchmarks are about."""
