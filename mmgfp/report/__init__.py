"""One HTML file about one run or several: what was pruned, and what it brought."""
