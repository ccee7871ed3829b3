"""What a person sees and types: flags, console, jobs, conversations, ranks."""
