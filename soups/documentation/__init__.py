"""docs/commands.md and docs/config.md from the command lines and the schemas; imports no torch."""
