"""From seed tasks to instructions: the client of a teacher, its log, prompts, curation."""
