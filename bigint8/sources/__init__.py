"""From a name to bytes: a folder, a preset, the hub, a GGUF file in a package."""
