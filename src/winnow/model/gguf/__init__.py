"""Writes GGUF files from transformers models, quantizes them with llama.cpp, and reads them as base models.

Writing: `architectures` describes model families in GGUF, `vocabulary` writes the tokenizer, `export` writes a file in full or
half precision, `mix` gives the type of each tensor, `quantize` calls llama.cpp's quantizer.
Reading: `file`, `read` and `read_vocabulary` convert a file, `dequantized` caches the result.
"""
