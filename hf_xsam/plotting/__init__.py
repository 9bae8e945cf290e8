"""Runs and measurements side by side, as a figure and as a page for the browser."""
