"""The hub: what a repository of it holds at one commit, and bringing files of it, each held to its hash."""
