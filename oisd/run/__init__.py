"""A run on disk and on several processes: folder, progress, summary, engine."""
