# Leaves out what winnow does not call of llama.cpp: its helpers for command-line programs. Fewer than half of the files remain.
set(LLAMA_BUILD_COMMON OFF)
