"""Is one model better than another: answers, people, a judge, win rates."""
