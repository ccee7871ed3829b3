"""Command-line interface: flags, console output, batch jobs, chat, ranks."""
