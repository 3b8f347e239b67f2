"""The transformers model with int8 layers: its layers, its skeleton on the meta device, a stage that is cut from it."""
