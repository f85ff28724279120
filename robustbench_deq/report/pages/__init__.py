"""Pages: tables and figures put together as files that load nothing else."""
