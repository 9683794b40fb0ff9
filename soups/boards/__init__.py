"""Leaderboards of several runs: joined tables, and one page to look at them."""
