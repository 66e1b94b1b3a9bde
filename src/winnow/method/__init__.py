"""The stages of a pipeline, one family a file, and the pipeline that applies them."""
