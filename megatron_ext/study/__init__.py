"""Studies: what is registered before the first run, which runs are due, what their differences say, and the page that shows it. Never imports torch."""
