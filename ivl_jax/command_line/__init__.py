"""What every command line of the project shares."""
