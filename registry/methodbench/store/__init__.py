"""Records: tables, sessions, migrations."""
