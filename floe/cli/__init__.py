"""The `floe` command: thin, one module per noun; nothing heavy is imported before it is needed."""
