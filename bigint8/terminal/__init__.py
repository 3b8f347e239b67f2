"""What people see on a terminal: flags, tables, a chat."""
