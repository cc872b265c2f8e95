"""One loaded model: resolve its name to files, generate, score, embed, and find which modules to adapt."""
