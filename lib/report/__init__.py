"""Runs that are done: from results.json to tables, pictures and what masks share."""
