"""GGUF files: written from a transformers model, quantized by llama.cpp itself, and read as a base model.

architectures: how a family of models is described in GGUF; tokenizer: its vocabulary; export: the file in full precision;
importance: what the calibration data says of each input; mix: which type each tensor gets; quantize: llama.cpp's quantizer.
file, read, read_vocabulary: the way back; dequantized: once a file.
"""
