"""How a run begins: settings, folders, processes and strategy, and whether it fits."""
