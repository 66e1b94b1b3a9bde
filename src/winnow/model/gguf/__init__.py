"""GGUF files for llama.cpp: written from a transformers model, and quantized by llama.cpp itself.

architectures: how a family of models is described in GGUF; tokenizer: its vocabulary; export: the file in full precision;
importance: what the calibration data says of each input; mix: which type each tensor gets; quantize: llama.cpp's quantizer.
"""
