"""What every command shares: errors, files, progress, command lines, charts."""
