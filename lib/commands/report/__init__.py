"""Tables, pictures and significance of finished runs."""
