"""Draw runs and measurements side by side, as a figure and as a web page."""
