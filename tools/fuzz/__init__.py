"""Parts of tools/fuzz_inputs.py: good inputs, what spoils them, and the commands that read them."""
