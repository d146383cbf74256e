"""Images and audio of raw data: found in folders, read and opened when they are drawn."""
