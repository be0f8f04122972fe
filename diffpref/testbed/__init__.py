"""The small world that proves a method: renderer, checker, ground-truth reward, base model, pairs, leaderboard."""
