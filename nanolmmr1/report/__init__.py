"""What a run shows and keeps: the metrics record, the logs, the live display, and the HTML report.

The room imports update/ for the definitions of ratio and KL; nothing in a step depends on it.
Begin with record.py, one step as one record; logs.py keeps it, display.py shows it, page.py plots it.
"""
